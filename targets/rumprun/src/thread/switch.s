# Switching threads: the registers that a called function must preserve, and the stack.

.section .text.switch, "ax"
.global switch_stacks
switch_stacks:                      # rdi: where to save, rsi: new stack pointer, rdx: passed on
    push rbx
    push r12
    push r13
    push r14
    push r15
    push rbp
    mov [rdi], rsp
    mov rsp, rsi
    mov rax, rdx
    pop rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    ret

.global thread_start
thread_start:                       # rax: the thread that ran before; the stack is empty but for a zero word
    mov rdi, rax
    call {first}
    ud2
