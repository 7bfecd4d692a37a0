#include "fiber.h"

asm(R"(
    .text
    .globl fiber_switch, fiber_jump, fiber_entry
    .hidden fiber_switch, fiber_jump, fiber_entry
fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rdi
fiber_jump:
    movq %rdi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
fiber_entry:
    callq *%rbx
    ud2
)");
