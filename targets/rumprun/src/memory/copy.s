# memcpy, memmove and memset with 64-bit registers. The compiler's own use `rep movsq` at all sizes, which an emulator runs
# three times slower than a loop. Where the CPU is a real one, long runs use `rep movsb` and `rep stosb` ({rep} is set).

.section .text.memory, "ax"
.global memcpy, memmove, memset

.balign 16
memcpy:                                 # rdi: to, rsi: from, rdx: bytes; returns rdi
    mov rax, rdi
    cmp rdx, 32
    ja 3f
    cmp rdx, 16
    jb 1f
    mov rcx, [rsi]
    mov r8, [rsi + 8]
    mov r9, [rsi + rdx - 16]
    mov r10, [rsi + rdx - 8]
    mov [rdi], rcx
    mov [rdi + 8], r8
    mov [rdi + rdx - 16], r9
    mov [rdi + rdx - 8], r10
    ret
1:  cmp edx, 8
    jb 2f
    mov rcx, [rsi]
    mov r8, [rsi + rdx - 8]
    mov [rdi], rcx
    mov [rdi + rdx - 8], r8
    ret
2:  cmp edx, 4
    jb 2f
    mov ecx, [rsi]
    mov r8d, [rsi + rdx - 4]
    mov [rdi], ecx
    mov [rdi + rdx - 4], r8d
    ret
2:  test edx, edx
    jz 2f
    movzx ecx, byte ptr [rsi]
    movzx r8d, byte ptr [rsi + rdx - 1]
    mov r9, rdx
    shr r9
    movzx r10d, byte ptr [rsi + r9]     # the middle one of three
    mov [rdi], cl
    mov [rdi + r9], r10b
    mov [rdi + rdx - 1], r8b
2:  ret

3:  cmp rdx, 512
    jb 4f
    cmp byte ptr [rip + {rep}], 0
    je 4f
    mov rcx, rdx
    rep movsb
    ret
4:  cmp rdx, 64
    jbe 6f
5:  mov rcx, [rsi]
    mov r8, [rsi + 8]
    mov r9, [rsi + 16]
    mov r10, [rsi + 24]
    mov [rdi], rcx
    mov [rdi + 8], r8
    mov [rdi + 16], r9
    mov [rdi + 24], r10
    mov rcx, [rsi + 32]
    mov r8, [rsi + 40]
    mov r9, [rsi + 48]
    mov r10, [rsi + 56]
    mov [rdi + 32], rcx
    mov [rdi + 40], r8
    mov [rdi + 48], r9
    mov [rdi + 56], r10
    add rsi, 64
    add rdi, 64
    sub rdx, 64
    cmp rdx, 64
    ja 5b
6:  cmp rdx, 32                         # 1 to 64 are left; at least 32 bytes lie before their end
    jbe 7f
    mov rcx, [rsi]
    mov r8, [rsi + 8]
    mov r9, [rsi + 16]
    mov r10, [rsi + 24]
    mov [rdi], rcx
    mov [rdi + 8], r8
    mov [rdi + 16], r9
    mov [rdi + 24], r10
7:  mov rcx, [rsi + rdx - 32]
    mov r8, [rsi + rdx - 24]
    mov r9, [rsi + rdx - 16]
    mov r10, [rsi + rdx - 8]
    mov [rdi + rdx - 32], rcx
    mov [rdi + rdx - 24], r8
    mov [rdi + rdx - 16], r9
    mov [rdi + rdx - 8], r10
    ret

.balign 16
memmove:                                # as memcpy, but the two may overlap
    mov rax, rdi
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jb 3f                               # `to` lies inside `from`: backwards
    neg rcx
    cmp rcx, rdx
    jae memcpy                          # they do not overlap
    cmp rdx, 8
    jb 2f
1:  mov rcx, [rsi]
    mov [rdi], rcx
    add rsi, 8
    add rdi, 8
    sub rdx, 8
    cmp rdx, 8
    jae 1b
2:  test rdx, rdx
    jz 5f
    mov cl, [rsi]
    mov [rdi], cl
    inc rsi
    inc rdi
    dec rdx
    jmp 2b
3:  cmp rdx, 8
    jb 4f
    mov rcx, [rsi + rdx - 8]
    mov [rdi + rdx - 8], rcx
    sub rdx, 8
    jmp 3b
4:  test rdx, rdx
    jz 5f
    mov cl, [rsi + rdx - 1]
    mov [rdi + rdx - 1], cl
    dec rdx
    jmp 4b
5:  ret

.balign 16
memset:                                 # rdi: to, esi: byte, rdx: bytes; returns rdi
    mov r9, rdi
    cmp rdx, 512
    jb 1f
    cmp byte ptr [rip + {rep}], 0
    je 1f
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r9
    ret
1:  movzx eax, sil
    movabs rcx, 0x0101010101010101
    imul rcx, rax
    mov rax, r9
    cmp rdx, 32
    jb 4f
2:  cmp rdx, 64
    jb 3f
    mov [rdi], rcx
    mov [rdi + 8], rcx
    mov [rdi + 16], rcx
    mov [rdi + 24], rcx
    mov [rdi + 32], rcx
    mov [rdi + 40], rcx
    mov [rdi + 48], rcx
    mov [rdi + 56], rcx
    add rdi, 64
    sub rdx, 64
    jmp 2b
3:  cmp rdx, 8
    jb 5f
    mov [rdi], rcx
    add rdi, 8
    sub rdx, 8
    jmp 3b
4:  cmp rdx, 8
    jae 3b
5:  test rdx, rdx
    jz 6f
    mov [rdi], cl
    inc rdi
    dec rdx
    jmp 5b
6:  ret
