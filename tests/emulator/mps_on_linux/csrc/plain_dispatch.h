// Below everything that PyTorch wraps around operators: no autograd, autocast, transforms or Python modes, nor what is
// particular to tensors of inference mode.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace emulator {

struct PlainDispatch {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset | c10::python_ks |
      c10::functorch_transforms_ks |
      c10::DispatchKeySet({c10::DispatchKey::Functionalize, c10::DispatchKey::PythonDispatcher})};
};

}  // namespace emulator
