/*
 * The C side of the comparison: what brackets, kicks and PIO exits cost without
 * Python. A guest in real mode, a thread for each vCPU, and a main thread that
 * does to its memslots what the Python benchmark does.
 *
 *   race bracket VCPUS COUNT FORM  a hold, three memslot ioctls, a release
 *   race kick VCPUS COUNT          a hold, and a release 1 ms later
 *   race pio SECONDS               OUT in a loop
 *
 * FORM is when the next bracket begins:
 *   tight     at once, so that the guest hardly gets to run in between
 *   entered   as soon as every vCPU has been back in KVM_RUN; the wait counts
 *   spaced    after a pause of 300 us that does not count
 *
 * Prints one duration a line, in nanoseconds: of each bracket, of each hold, or
 * of an exit on average. Then "# progress N": how often the first vCPU's guest
 * went round its loop meanwhile.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <linux/kvm.h>

#define MAX_VCPUS 64
#define RAM_BYTES 0x20000
#define HALF 0x8000u
#define SPLIT_AT 0x10000u /* the slot that is split and merged: two halves from here */
#define CODE 0x1000
#define COUNTER 0x2000

struct vcpu {
    pthread_t thread;
    struct kvm_run *run;
    int fd;
    bool inside;      /* in KVM_RUN, or just about to be */
    uint64_t entries; /* how often it went there */
    uint64_t exits;   /* how often it came out by itself */
};

static struct vcpu vcpus[MAX_VCPUS];
static int vcpu_count, vm;
static unsigned char *ram;

/* The gate. One mutex guards `held` and each vCPU's `inside` and `entries`. */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static bool held;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void on_kick(int number)
{
    (void)number; /* that it interrupts KVM_RUN is all it is for */
}

static void *vcpu_main(void *argument)
{
    struct vcpu *self = argument;

    for (;;) {
        pthread_mutex_lock(&gate);
        while (held)
            pthread_cond_wait(&opened, &gate);
        self->run->immediate_exit = 0;
        self->inside = true;
        self->entries++;
        pthread_cond_signal(&moved);
        pthread_mutex_unlock(&gate);

        int failed = ioctl(self->fd, KVM_RUN, 0) < 0 ? errno : 0;

        pthread_mutex_lock(&gate);
        self->inside = false;
        pthread_cond_signal(&moved);
        pthread_mutex_unlock(&gate);
        if (failed == EINTR || failed == EAGAIN)
            continue;
        if (failed || (self->run->exit_reason != KVM_EXIT_IO &&
                       self->run->exit_reason != KVM_EXIT_MMIO)) {
            fprintf(stderr, "vCPU stopped: errno %d, exit %u\n", failed,
                    self->run->exit_reason);
            exit(1);
        }
        __atomic_add_fetch(&self->exits, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void hold(void)
{
    bool first = true, any;

    pthread_mutex_lock(&gate);
    held = true;
    do {
        any = false;
        for (int i = 0; i < vcpu_count; i++) {
            if (!vcpus[i].inside)
                continue;
            any = true;
            if (first) {
                vcpus[i].run->immediate_exit = 1;
                pthread_kill(vcpus[i].thread, SIGUSR1);
            }
        }
        first = false;
        if (any)
            pthread_cond_wait(&moved, &gate);
    } while (any);
    pthread_mutex_unlock(&gate);
}

static void release(void)
{
    pthread_mutex_lock(&gate);
    held = false;
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&gate);
}

/* Until every vCPU has entered more often than it had. */
static void wait_entered(const uint64_t *before)
{
    pthread_mutex_lock(&gate);
    for (int i = 0; i < vcpu_count; i++)
        while (vcpus[i].entries == before[i])
            pthread_cond_wait(&moved, &gate);
    pthread_mutex_unlock(&gate);
}

static void set_slot(uint32_t slot, uint64_t at, uint64_t bytes)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .guest_phys_addr = at,
        .memory_size = bytes,
        .userspace_addr = (uintptr_t)ram + at,
    };

    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        fail("KVM_SET_USER_MEMORY_REGION");
}

/* Three ioctls each way: one slot of two halves becomes two slots, or back. */
static void change(bool split)
{
    set_slot(1, SPLIT_AT, 0);
    if (split) {
        set_slot(1, SPLIT_AT, HALF);
        set_slot(2, SPLIT_AT + HALF, HALF);
    } else {
        set_slot(2, SPLIT_AT + HALF, 0);
        set_slot(1, SPLIT_AT, 2 * HALF);
    }
}

static void make_vm(int count, const unsigned char *program, size_t bytes)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    struct sigaction action = {.sa_handler = on_kick};

    if (kvm < 0)
        fail("/dev/kvm");
    if ((vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0)
        fail("KVM_CREATE_VM");
    if (ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) < 0)
        fail("KVM_SET_TSS_ADDR");
    sigaction(SIGUSR1, &action, NULL);
    ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        fail("mmap");
    memset(ram, 0, RAM_BYTES);
    memcpy(ram + CODE, program, bytes);
    set_slot(0, 0, SPLIT_AT);
    set_slot(1, SPLIT_AT, 2 * HALF);
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    for (int i = 0; i < count; i++) {
        struct kvm_sregs special;
        struct kvm_regs regs = {.rip = CODE, .rflags = 2};

        if ((vcpus[i].fd = ioctl(vm, KVM_CREATE_VCPU, i)) < 0)
            fail("KVM_CREATE_VCPU");
        vcpus[i].run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpus[i].fd, 0);
        if (vcpus[i].run == MAP_FAILED)
            fail("mmap of kvm_run");
        if (ioctl(vcpus[i].fd, KVM_GET_SREGS, &special) < 0)
            fail("KVM_GET_SREGS");
        special.cs.base = 0;
        special.cs.selector = 0;
        special.ds.base = SPLIT_AT;
        special.ds.selector = SPLIT_AT >> 4;
        if (ioctl(vcpus[i].fd, KVM_SET_SREGS, &special) < 0)
            fail("KVM_SET_SREGS");
        if (ioctl(vcpus[i].fd, KVM_SET_REGS, &regs) < 0)
            fail("KVM_SET_REGS");
    }
    vcpu_count = count;
    for (int i = 0; i < count; i++)
        if (pthread_create(&vcpus[i].thread, NULL, vcpu_main, &vcpus[i]))
            fail("pthread_create");
}

static uint32_t progress(void)
{
    return *(volatile uint32_t *)(ram + COUNTER);
}

int main(int argc, char **argv)
{
    /* Reads the upper half of the changing memory through ds, and counts through cs. */
    static const unsigned char reading[] = {
        0xa0, 0x00, 0x80,                         /* mov al, [0x8000]           */
        0x66, 0x2e, 0xff, 0x06, 0x00, COUNTER >> 8, /* inc dword cs:[COUNTER]   */
        0xeb, 0xf5,                               /* jmp to the start           */
    };
    static const unsigned char writing[] = {
        0xba, 0xf8, 0x03, /* mov dx, 0x3f8 */
        0xee,             /* out dx, al    */
        0xeb, 0xfd,       /* jmp to the out */
    };
    const char *what = argc > 1 ? argv[1] : "";

    if (!strcmp(what, "pio") && argc == 3) {
        make_vm(1, writing, sizeof writing);
        usleep(50000);
        uint64_t exits = __atomic_load_n(&vcpus[0].exits, __ATOMIC_RELAXED);
        int64_t began = now();
        usleep((useconds_t)(atof(argv[2]) * 1e6));
        int64_t took = now() - began;
        exits = __atomic_load_n(&vcpus[0].exits, __ATOMIC_RELAXED) - exits;
        printf("%.1f\n", (double)took / exits);
        fflush(stdout);
        _exit(0);
    }
    bool kick = !strcmp(what, "kick") && argc == 4;
    if (!kick && !(!strcmp(what, "bracket") && argc == 5))
        return 2;
    int count = atoi(argv[3]), threads = atoi(argv[2]);
    bool entered = !kick && !strcmp(argv[4], "entered");
    bool spaced = !kick && !strcmp(argv[4], "spaced");
    if (count < 1 || threads < 1 || threads > MAX_VCPUS)
        return 2;
    int64_t *took = calloc(count, sizeof *took);
    if (!took)
        fail("calloc");

    make_vm(threads, reading, sizeof reading);
    uint64_t none[MAX_VCPUS] = {0};
    wait_entered(none);
    usleep(50000);
    uint32_t at_first = progress();
    for (int i = 0; i < count; i++) {
        uint64_t before[MAX_VCPUS];
        int64_t began = now();

        hold();
        for (int j = 0; j < threads; j++)
            before[j] = vcpus[j].entries; /* nobody writes it while the gate is held */
        if (kick) {
            took[i] = now() - began;
            release();
            usleep(1000);
            continue;
        }
        change(i % 2 == 0);
        release();
        if (entered)
            wait_entered(before);
        took[i] = now() - began;
        if (spaced)
            usleep(300);
    }
    uint32_t moved_on = progress() - at_first;
    for (int i = 0; i < count; i++)
        printf("%lld\n", (long long)took[i]);
    printf("# progress %u\n", moved_on);
    fflush(stdout);
    _exit(0);
}
