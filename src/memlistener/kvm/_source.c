/*
 * The C side of memlistener.kvm: typed ioctls, KVM_RUN, and the kick.
 *
 * Only what cannot be done in Python, or not in time, is here. cffi releases
 * the GIL around every call. Nothing here allocates or keeps a pointer beyond
 * the call that passed it.
 */

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/kvm.h>

/* Newer than the oldest headers we build against; the numbers are ABI. */
#ifndef KVM_CAP_IOEVENTFD_NO_LENGTH
#define KVM_CAP_IOEVENTFD_NO_LENGTH 100
#endif
#ifndef KVM_CAP_COALESCED_PIO
#define KVM_CAP_COALESCED_PIO 162
#endif
#ifndef KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 168
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING
#define KVM_CAP_DIRTY_LOG_RING 192
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES (1ULL << 0)
#endif

#ifndef KVM_CLEAR_DIRTY_LOG
struct kvm_clear_dirty_log {
    __u32 slot;
    __u32 num_pages;
    __u64 first_page;
    union {
        void *dirty_bitmap;
        __u64 padding2;
    };
};
#define KVM_CLEAR_DIRTY_LOG _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)
#endif
#ifndef KVM_RESET_DIRTY_RINGS
#define KVM_RESET_DIRTY_RINGS _IO(KVMIO, 0xc7)
#endif
#ifndef KVM_EXIT_DIRTY_RING_FULL
#define KVM_EXIT_DIRTY_RING_FULL 31
#endif
#ifndef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 64 /* x86's; elsewhere such headers know of no ring */
#endif

/* Proposed in "KVM: stop all vcpus before modifying memslots", never merged. */
#ifndef KVM_KICK_ALL_RUNNING_VCPUS
#define KVM_KICK_ALL_RUNNING_VCPUS _IO(KVMIO, 0xd2)
#endif
#ifndef KVM_RESUME_ALL_KICKED_VCPUS
#define KVM_RESUME_ALL_KICKED_VCPUS _IO(KVMIO, 0xd3)
#endif

/* fds.py unpacks these exits from the mapped bytes, so their layout is checked here. */
#define AT(exit, member, offset)                                                     \
    _Static_assert(offsetof(struct kvm_run, exit.member) ==                          \
                       offsetof(struct kvm_run, exit) + (offset),                    \
                   #exit "." #member " is elsewhere")
AT(io, direction, 0);
AT(io, size, 1);
AT(io, port, 2);
AT(io, count, 4);
AT(io, data_offset, 8);
AT(mmio, phys_addr, 0);
AT(mmio, data, 8);
AT(mmio, len, 16);
AT(mmio, is_write, 20);
AT(internal, suberror, 0);
AT(internal, ndata, 4);
AT(internal, data, 8);

/* Typed ioctls ------------------------------------------------------------ */

static int result(int r)
{
    return r < 0 ? -errno : r;
}

static int ml_get_api_version(int kvm)
{
    return result(ioctl(kvm, KVM_GET_API_VERSION, 0));
}

static int ml_get_vcpu_mmap_size(int kvm)
{
    return result(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
}

static int ml_check_extension(int fd, int cap)
{
    return result(ioctl(fd, KVM_CHECK_EXTENSION, (long)cap));
}

static int ml_create_vm(int kvm)
{
    return result(ioctl(kvm, KVM_CREATE_VM, 0));
}

static int ml_create_vcpu(int vm, unsigned int id)
{
    return result(ioctl(vm, KVM_CREATE_VCPU, (unsigned long)id));
}

static int ml_set_user_memory_region(int vm, uint32_t slot, uint32_t flags,
                                     uint64_t guest_phys_addr, uint64_t memory_size,
                                     uint64_t userspace_addr)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .flags = flags,
        .guest_phys_addr = guest_phys_addr,
        .memory_size = memory_size,
        .userspace_addr = userspace_addr,
    };
    return result(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static int ml_get_dirty_log(int vm, uint32_t slot, void *bitmap)
{
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
    return result(ioctl(vm, KVM_GET_DIRTY_LOG, &log));
}

static int ml_clear_dirty_log(int vm, uint32_t slot, uint64_t first_page, uint32_t pages,
                              void *bitmap)
{
    struct kvm_clear_dirty_log log = {
        .slot = slot,
        .num_pages = pages,
        .first_page = first_page,
        .dirty_bitmap = bitmap,
    };
    return result(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log));
}

static int ml_enable_cap(int fd, uint32_t cap, uint64_t arg)
{
    struct kvm_enable_cap enable = {.cap = cap, .args = {arg}};
    return result(ioctl(fd, KVM_ENABLE_CAP, &enable));
}

static int ml_reset_dirty_rings(int vm)
{
    return result(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0));
}

static int ml_kick_all_running_vcpus(int vm)
{
    return result(ioctl(vm, KVM_KICK_ALL_RUNNING_VCPUS, 0));
}

static int ml_resume_all_kicked_vcpus(int vm)
{
    return result(ioctl(vm, KVM_RESUME_ALL_KICKED_VCPUS, 0));
}

/* Bitmaps ------------------------------------------------------------------- */

/* dst |= src. Most of a harvested bitmap is zero, and then dst is not even read. */
static void ml_bitmap_or(uint8_t *dst, const uint8_t *src, size_t size)
{
    size_t i = 0;

    for (; i + 8 <= size; i += 8) {
        uint64_t more, bits;
        memcpy(&more, src + i, 8);
        if (!more)
            continue;
        memcpy(&bits, dst + i, 8);
        bits |= more;
        memcpy(dst + i, &bits, 8);
    }
    for (; i < size; i++)
        dst[i] |= src[i];
}

/* 64 bits from byte i on, bit 0 of the first byte lowest; beyond the end there are zeros. */
static uint64_t word_at(const uint8_t *bitmap, size_t i, size_t size)
{
    uint64_t word = 0;

    if (size - i >= 8)
        memcpy(&word, bitmap + i, 8); /* of a known size: one instruction */
    else
        memcpy(&word, bitmap + i, size - i);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/*
 * The runs of set bits, as the bit after which each begins or ends: every bit
 * that differs from the one below it. bounds may be NULL, to count them first;
 * the number is even.
 */
static size_t ml_bitmap_bounds(const uint8_t *bitmap, size_t size, uint64_t base, uint64_t *bounds)
{
    uint64_t last = 0; /* the highest bit of the word before */
    size_t n = 0;

    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = word_at(bitmap, i, size);
        uint64_t edges = word ^ (word << 1 | last);

        if (!edges) /* nearly always */
            continue;
        last = word >> 63;
        if (!bounds) {
            n += (size_t)__builtin_popcountll(edges);
            continue;
        }
        for (; edges; edges &= edges - 1)
            bounds[n++] = base + 8 * i + (uint64_t)__builtin_ctzll(edges);
    }
    if (last) { /* a run up to the very end */
        if (bounds)
            bounds[n] = base + 8 * ((size + 7) / 8 * 8);
        n++;
    }
    return n;
}

/* The dirty ring ------------------------------------------------------------ */

/* struct kvm_dirty_gfn, which old headers lack. */
struct dirty_gfn {
    uint32_t flags;
    uint32_t slot;
    uint64_t offset;
};
#define DIRTY_GFN_DIRTY 1u
#define DIRTY_GFN_RESET 2u

static int is_dirty(const struct dirty_gfn *gfns, uint32_t entries, uint32_t at)
{
    return __atomic_load_n(&gfns[at % entries].flags, __ATOMIC_ACQUIRE) == DIRTY_GFN_DIRTY;
}

/*
 * Take what the kernel has put into a vCPU's ring: slot and page of each entry
 * into found, which has room for all. The flag is what hands an entry over, in
 * both directions, so it is read before the entry and written after.
 */
static uint32_t ml_collect_dirty_gfns(void *ring, uint32_t entries, uint32_t *next,
                                      uint64_t *found)
{
    struct dirty_gfn *gfns = ring;
    uint32_t n = 0;

    for (; n < entries; n++) {
        struct dirty_gfn *gfn = &gfns[*next % entries];
        if (!is_dirty(gfns, entries, *next))
            break;
        found[2 * n] = gfn->slot;
        found[2 * n + 1] = gfn->offset;
        __atomic_store_n(&gfn->flags, DIRTY_GFN_RESET, __ATOMIC_RELEASE);
        ++*next;
    }
    return n;
}

/*
 * For a ring that has overflowed: the kernel went on writing where it was, and
 * will look for what we give back where we are. Give back what lies between,
 * used or not: the entries before the next one that the kernel has written, or,
 * where it has written none and will not for it takes the ring for full, as
 * many as are given.
 */
static uint32_t ml_skip_dirty_gfns(void *ring, uint32_t entries, uint32_t *next, uint32_t none)
{
    struct dirty_gfn *gfns = ring;
    uint32_t n = 0;

    while (n < entries && !is_dirty(gfns, entries, *next + n))
        n++;
    if (n == entries)
        n = none;
    /* A vCPU that is running may have written some after we had passed them. It writes
       in order, so they are just before the one that was found. */
    while (n > 0 && is_dirty(gfns, entries, *next + n - 1))
        n--;
    for (uint32_t i = 0; i < n; i++)
        __atomic_store_n(&gfns[(*next)++ % entries].flags, DIRTY_GFN_RESET, __ATOMIC_RELEASE);
    return n;
}

/* ioeventfds and coalesced writes ------------------------------------------- */

static int ml_ioeventfd(int vm, uint64_t addr, uint32_t len, int fd, uint32_t flags,
                        uint64_t datamatch)
{
    struct kvm_ioeventfd ioeventfd = {
        .datamatch = datamatch,
        .addr = addr,
        .len = len,
        .fd = fd,
        .flags = flags,
    };
    return result(ioctl(vm, KVM_IOEVENTFD, &ioeventfd));
}

/* The member that says MMIO or PIO was called pad before there was PIO. */
static int ml_register_coalesced_mmio(int vm, uint64_t addr, uint32_t size, uint32_t pio)
{
    struct kvm_coalesced_mmio_zone zone = {.addr = addr, .size = size, .pad = pio};
    return result(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone));
}

static int ml_unregister_coalesced_mmio(int vm, uint64_t addr, uint32_t size, uint32_t pio)
{
    struct kvm_coalesced_mmio_zone zone = {.addr = addr, .size = size, .pad = pio};
    return result(ioctl(vm, KVM_UNREGISTER_COALESCED_MMIO, &zone));
}

/* fds.py unpacks the entries from the mapped bytes. */
_Static_assert(sizeof(struct kvm_coalesced_mmio_ring) == 8, "the ring has another header");
_Static_assert(sizeof(struct kvm_coalesced_mmio) == 24, "the ring has other entries");
_Static_assert(offsetof(struct kvm_coalesced_mmio, phys_addr) == 0, "phys_addr is elsewhere");
_Static_assert(offsetof(struct kvm_coalesced_mmio, len) == 8, "len is elsewhere");
_Static_assert(offsetof(struct kvm_coalesced_mmio, pad) == 12, "pio is elsewhere");
_Static_assert(offsetof(struct kvm_coalesced_mmio, data) == 16, "data is elsewhere");

/*
 * The kernel writes an entry, then last; we read last, then the entry, then tell
 * it with first that the entry is free again. first is written by us only.
 */
static uint32_t ml_coalesced_count(const void *memory, uint32_t entries)
{
    const struct kvm_coalesced_mmio_ring *ring = memory;
    uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
    uint32_t first = __atomic_load_n(&ring->first, __ATOMIC_RELAXED);

    return last >= first ? last - first : last + entries - first;
}

static void ml_coalesced_take(void *memory, uint32_t entries, uint32_t count)
{
    struct kvm_coalesced_mmio_ring *ring = memory;

    __atomic_store_n(&ring->first, (ring->first + count) % entries, __ATOMIC_RELEASE);
}

/* Running and kicking ------------------------------------------------------ */

static int kick_signal;

static void kicked(int signo)
{
    /* That it was delivered is all: it makes KVM_RUN return EINTR. */
    (void)signo;
}

/*
 * The first few real-time signals are the ones that other libraries use, so
 * start a little further on, and take none that already means something. The
 * caller holds a lock, and calls this once in a process.
 */
static int ml_install_kick_handler(void)
{
    struct sigaction action = {.sa_handler = kicked}; /* no SA_RESTART */
    sigemptyset(&action.sa_mask);

    for (int signo = SIGRTMIN + 6; signo <= SIGRTMAX; signo++) {
        struct sigaction old;
        if (sigaction(signo, NULL, &old) < 0)
            return -errno;
        if ((old.sa_flags & SA_SIGINFO) || old.sa_handler != SIG_DFL)
            continue;
        if (sigaction(signo, &action, NULL) < 0)
            return -errno;
        kick_signal = signo;
        return signo;
    }
    return -EBUSY;
}

/*
 * *tid is the thread inside KVM_RUN, or 0. Here it is stored before the kernel
 * reads immediate_exit; in ml_kick, immediate_exit is stored before *tid is
 * read. With both sequentially consistent, at least one side sees the other:
 * either the kernel finds immediate_exit set, or the thread gets the signal.
 */
static int ml_run(int vcpu, int *tid)
{
    static __thread int unblocked;
    int nobody = 0;
    int err = 0;

    if (!unblocked) {
        /* A thread inherits its mask, and a blocked signal would not get us out. */
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, kick_signal);
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        unblocked = 1;
    }
    if (!__atomic_compare_exchange_n(tid, &nobody, (int)syscall(SYS_gettid), 0, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return EBUSY; /* a second thread: it could not be kicked */
    if (ioctl(vcpu, KVM_RUN, 0) < 0)
        err = errno;
    __atomic_store_n(tid, 0, __ATOMIC_SEQ_CST);
    return err;
}

/*
 * ESRCH (the thread left and ended since *tid was read) is no failure. EAGAIN
 * is: the queue of pending signals was full, and the kick must be repeated.
 */
static int ml_kick(struct kvm_run *run, int *tid)
{
    int thread;

    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    thread = __atomic_load_n(tid, __ATOMIC_SEQ_CST);
    if (thread && syscall(SYS_tgkill, getpid(), thread, kick_signal) < 0 && errno != ESRCH)
        return errno;
    return 0;
}

/* Exits whose structs have grown over the years ------------------------------ */

static uint64_t ml_fail_entry_reason(const struct kvm_run *run)
{
    return run->fail_entry.hardware_entry_failure_reason;
}

static uint32_t ml_fail_entry_cpu(const struct kvm_run *run)
{
#ifdef KVM_CAP_LAST_CPU /* came with the member */
    return run->fail_entry.cpu;
#else
    (void)run;
    return 0;
#endif
}

static uint32_t ml_system_event_type(const struct kvm_run *run)
{
    return run->system_event.type;
}

static int ml_system_event_data(const struct kvm_run *run, uint64_t data[16])
{
#ifdef KVM_CAP_SYSTEM_EVENT_DATA
    uint32_t n = run->system_event.ndata;
    if (n > 16)
        n = 16;
    memcpy(data, run->system_event.data, n * sizeof data[0]);
    return (int)n;
#else
    data[0] = run->system_event.flags;
    return 1;
#endif
}

/* x86-64 only --------------------------------------------------------------- */

#if defined(__x86_64__)
static int ml_set_tss_addr(int vm, unsigned long addr)
{
    return result(ioctl(vm, KVM_SET_TSS_ADDR, addr));
}

static int ml_get_regs(int vcpu, struct kvm_regs *regs)
{
    return result(ioctl(vcpu, KVM_GET_REGS, regs));
}

static int ml_set_regs(int vcpu, const struct kvm_regs *regs)
{
    return result(ioctl(vcpu, KVM_SET_REGS, regs));
}

static int ml_get_sregs(int vcpu, struct kvm_sregs *sregs)
{
    return result(ioctl(vcpu, KVM_GET_SREGS, sregs));
}

static int ml_set_sregs(int vcpu, const struct kvm_sregs *sregs)
{
    return result(ioctl(vcpu, KVM_SET_SREGS, sregs));
}
#endif
