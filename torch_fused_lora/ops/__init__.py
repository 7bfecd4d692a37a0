"""The operators, a file each: schema, checks, shape function, autograd and the portable kernels."""
