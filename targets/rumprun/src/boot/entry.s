# From the PVH entry point (Xen's pvh.markdown: 32-bit protected mode, paging off, flat segments, ebx = physical address
# of hvm_start_info) to 64-bit code in the top of the address space.

.section .note.pvh, "a", @note
    .long 4                         # name size
    .long 8                         # description size
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad phys_pvh_entry

.section .boot.text, "ax"
.code32
.global pvh_entry, long_mode, boot_tables, boot_stack_guard, boot_stack_top, boot_gdt_pointer
pvh_entry:
    cli
    cld
    mov esp, offset phys_boot_stack_top
    rdtsc
    mov [phys_entry_tsc], eax
    mov [phys_entry_tsc + 4], edx

    # First page tables: the first GiB of memory in 2 MiB pages, seen at 0, at the direct map and at the image's place.
    # boot_tables is zero: bss. +0 PML4, +4096 PDPT (low and direct map), +8192 PDPT (image), +12288 page directory.
    mov edi, offset phys_boot_tables
    lea eax, [edi + 4096 + 3]
    mov [edi], eax
    mov [edi + 256 * 8], eax
    lea eax, [edi + 8192 + 3]
    mov [edi + 511 * 8], eax
    lea eax, [edi + 12288 + 3]
    mov [edi + 4096], eax
    mov [edi + 8192 + 510 * 8], eax
    mov eax, 0x83                   # present, writable, 2 MiB
    mov ecx, 12288
1:  mov [edi + ecx], eax
    add eax, 0x200000
    add ecx, 8
    cmp ecx, 16384
    jne 1b

    mov cr3, edi
    mov eax, cr4
    or eax, 0x20                    # PAE
    mov cr4, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x900                   # LME, NXE
    wrmsr
    mov eax, cr0
    or eax, 0x80010001              # PG, WP, PE
    mov cr0, eax
    lgdt [phys_boot_gdt_pointer]
    push 0x08
    mov eax, offset phys_long_mode
    push eax
    retf

.code64
long_mode:
    movabs rax, offset high_half
    jmp rax
high_half:
    lea rsp, [rip + boot_stack_top]
    xor eax, eax
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    xor ebp, ebp
    mov edi, ebx
    call {boot_main}
    ud2

.section .rodata.boot, "a"
.balign 8
boot_gdt:
    .quad 0
    .quad 0x00209b0000000000        # 64-bit code
boot_gdt_pointer:
    .word 15
    .long boot_gdt_phys_low
.set boot_gdt_phys_low, boot_gdt + 0x80000000

.section .bss.boot, "aw", @nobits
.balign 4096
boot_tables:
    .skip 16384
boot_stack_guard:                       # not mapped once the final tables are in use
    .skip 4096
    .skip 16384
boot_stack_top:
