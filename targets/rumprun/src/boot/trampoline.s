# Where the other CPUs start: copied to TRAMPOLINE (0x8000), entered in real mode with cs = 0x0800, ip = 0.
# It ends in the image, on a stack of its own, with the number of the CPU in edi.

.section .rodata.trampoline, "a"
.balign 16
.global trampoline_start
.global trampoline_end
.global trampoline_tables
.code16
trampoline_start:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x0f, 0x01, 0x16          # lgdt [trampoline_gdt_pointer]
    .word trampoline_gdt_pointer - trampoline_start
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                # jmp far 0x10:protected
    .long 0x8000 + protected - trampoline_start
    .word 0x10

.code32
protected:
    mov ax, 0x18
    mov ds, ax
    mov ss, ax
    mov eax, cr4
    or eax, 0x20                    # PAE
    mov cr4, eax
    .byte 0xa1                      # mov eax, [trampoline_tables]
    .long 0x8000 + trampoline_tables - trampoline_start
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x900                   # LME, NXE
    wrmsr
    mov eax, cr0
    or eax, 0x80010001              # PG, WP, PE
    mov cr0, eax
    .byte 0xea                      # jmp far 0x08:long
    .long 0x8000 + trampoline_long - trampoline_start
    .word 0x08

.code64
trampoline_long:
    xor eax, eax
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    movabs rax, offset secondary_entry
    jmp rax

.balign 8
# The descriptors have their accessed bits set, as the CPU cannot write to the page.
trampoline_gdt:
    .quad 0
    .quad 0x00209b0000000000        # 64-bit code
    .quad 0x00cf9b000000ffff        # 32-bit code
    .quad 0x00cf93000000ffff        # 32-bit data
trampoline_gdt_pointer:
    .word 31
    .long 0x8000 + trampoline_gdt - trampoline_start
.balign 4
trampoline_tables:
    .long 0                         # filled in by `cpu::smp`: physical address of the page tables
trampoline_end:

.section .text.secondary, "ax"
secondary_entry:
    # Each CPU takes the next number, and with it a stack.
    mov edi, 1
    lock xadd dword ptr [rip + {next}], edi
    mov rax, [rip + {stacks}]
    mov rsp, [rax + rdi * 8]
    xor ebp, ebp
    call {main}
    ud2
