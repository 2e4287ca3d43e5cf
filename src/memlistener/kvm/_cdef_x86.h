/* The part of _cdef.h that exists on x86-64 only. */

struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx;
    uint64_t rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11;
    uint64_t r12, r13, r14, r15;
    uint64_t rip, rflags;
};

struct kvm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type;
    uint8_t present, dpl, db, s, l, g, avl;
    uint8_t unusable;
    uint8_t padding;
};

struct kvm_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
};

struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss;
    struct kvm_segment tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8;
    uint64_t efer;
    uint64_t apic_base;
    unsigned long long interrupt_bitmap[4]; /* __u64; compilers tell arrays of it from uint64_t[] */
};

int ml_set_tss_addr(int vm, unsigned long addr);
int ml_get_regs(int vcpu, struct kvm_regs *regs);
int ml_set_regs(int vcpu, const struct kvm_regs *regs);
int ml_get_sregs(int vcpu, struct kvm_sregs *sregs);
int ml_set_sregs(int vcpu, const struct kvm_sregs *sregs);
