# A guest in one boot sector: 16-bit real mode only, for hosts whose KVM runs nothing else.
#
# Every round compares a word in each 64 bytes of a stretch of memory with what it must hold and rewrites it,
# then waits for some ticks of the timer, so that it neither prints nor dirties without end. (Every word would
# be too slow: a KVM that emulates real mode needs half a microsecond an instruction.) It says and takes on
# COM1 what guest.c does, as far as it fits:
#   curling ready pages=128
#   curling round=123 corrupt=0 uptime_ms=4567      corrupt: pages found wrong since the start
#   p  power off         r  reset                   (one byte each, answered with "curling ok")
#
# A word holds a generator's value; the generator starts anew each round, seeded with the round's number.
# The same image also is an option ROM, which the firmware starts before it looks for disks: that saves the
# four seconds such a KVM takes for the rest of the firmware, and needs no disk.
#
# The stretch is 0x10000 to 0x8ffff. Symbols given to the assembler: REPORT_MS, and TICKS, the timer interrupts
# of 1 ms waited for between two rounds.

        .code16
        .equ COM1, 0x3f8
        .equ ticks, 0x7e00              # variables, behind the sector
        .equ round, 0x7e04
        .equ corrupt, 0x7e08
        .equ reported, 0x7e0c
        .equ GOLDEN, 0x9e3779b1
        .equ STEP, 0x01000193

        .globl _start
_start:
        .byte   0x55, 0xaa              # as an option ROM: its mark, and its length in 512 bytes, 4;
        .byte   4                       # as code: push %bp, stosb, add $0xfa, %al
        cli                             # an option ROM starts here
        cli
        cld
        call    0f                      # go to where a boot sector is, wherever this is
0:      popw    %si
        subw    $(0b - _start), %si
        movw    %cs, %ax
        movw    %ax, %ds
        xorw    %ax, %ax
        movw    %ax, %es
        movw    $0x7c00, %di
        movw    $256, %cx
        rep movsw
        ljmp    $0, $main

main:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movw    %ax, %es
        movw    $ticks, %di
        movw    $8, %cx
        rep stosw                       # all variables 0
        movl    $tick, 0x20             # interrupt 8, segment 0
        movb    $0x34, %al              # timer 0, mode 2: 1193182 Hz / 1193
        outb    %al, $0x43
        movb    $(1193 & 255), %al
        outb    %al, $0x40
        movb    $(1193 >> 8), %al
        outb    %al, $0x40
        movb    $0xfe, %al              # no interrupt but the timer's
        outb    %al, $0x21
        sti

        call    sweep                   # round 0: compared with what happens to be there, so
        movl    $0, corrupt             # forget that
        movw    $ready, %si
        call    puts

again:
        incl    round
        call    sweep
        movl    ticks, %eax
        subl    reported, %eax
        cmpl    $REPORT_MS, %eax
        jb      quiet
        addl    %eax, reported
        movw    $s_round, %si
        movl    round, %eax
        call    field
        movl    corrupt, %eax           # si is at the next text already
        call    field
        movl    ticks, %eax
        call    field
        call    puts                    # the end of the line

quiet:
        movw    $TICKS, %cx
0:      hlt
        loop    0b
        movw    $(COM1 + 5), %dx
        inb     %dx, %al
        testb   $1, %al
        jz      again
        movw    $COM1, %dx
        inb     %dx, %al
        movw    $s_ok, %si
        cmpb    $'r', %al
        je      1f
        cmpb    $'p', %al
        jne     again
        call    puts
        movw    $0x604, %dx             # PM1a control, where SeaBIOS puts it: SLP_EN, S5
        movw    $0x2000, %ax
        outw    %ax, %dx
1:      call    puts
        movb    $0xfe, %al              # the keyboard controller pulls the reset line
        outb    %al, $0x64
0:      hlt
        jmp     0b

# Compare the stretch with what the last round wrote, and write what this one does.
sweep:
        imull   $GOLDEN, round, %eax    # what is written
        leal    -GOLDEN(%eax), %ebp     # what is expected
        movw    $0x1000, %bx
0:      movw    %bx, %es
        xorw    %di, %di
1:      xorw    %dx, %dx                # a page: dx says whether it was wrong
        movw    $64, %cx
2:      cmpl    %es:(%di), %ebp
        je      3f
        incw    %dx
3:      movl    %eax, %es:(%di)
        addw    $64, %di
        addl    $STEP, %eax
        addl    $STEP, %ebp
        loop    2b
        cmpw    $1, %dx
        sbbl    $-1, corrupt            # adds 1 unless dx is 0
        testw   %di, %di
        jnz     1b
        addw    $0x1000, %bx
        cmpw    $0x9000, %bx
        jne     0b
        ret

tick:
        pushw   %ax
        incl    %cs:ticks
        movb    $0x20, %al
        outb    %al, $0x20
        popw    %ax
        iret

# Print the text at si, then eax in decimal. Leaves si behind the text.
field:
        pushl   %eax
        call    puts
        popl    %eax
        movl    $10, %ebx
        xorw    %cx, %cx
0:      xorl    %edx, %edx
        divl    %ebx
        pushw   %dx
        incw    %cx
        testl   %eax, %eax
        jnz     0b
1:      popw    %ax
        addb    $'0', %al
        call    putc
        loop    1b
        ret

puts:
        lodsb
        testb   %al, %al
        jz      0f
        call    putc
        jmp     puts
putc:
        pushw   %dx
        pushw   %ax
        movw    $(COM1 + 5), %dx
1:      inb     %dx, %al
        testb   $0x20, %al              # room in the transmitter
        jz      1b
        movw    $COM1, %dx
        popw    %ax
        outb    %al, %dx
        popw    %dx
0:      ret

ready:  .asciz  "curling ready pages=128\n"
s_ok:   .asciz  "curling ok\n"
s_round:.asciz  "curling round="
        .asciz  " corrupt="
        .asciz  " uptime_ms="
        .asciz  "\n"

        .org    510
        .word   0xaa55
        .org    2048
