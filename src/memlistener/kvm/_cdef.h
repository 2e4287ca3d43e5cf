/*
 * What Python sees of the C side, on every architecture. cffi compares each
 * struct and constant with linux/kvm.h when the extension is built or loaded;
 * "...;" stands for the members that nothing here needs.
 */

/* Exit reasons and sub-codes that are told apart. */
#define KVM_EXIT_UNKNOWN 0
#define KVM_EXIT_IO 2
#define KVM_EXIT_DEBUG 4
#define KVM_EXIT_HLT 5
#define KVM_EXIT_MMIO 6
#define KVM_EXIT_SHUTDOWN 8
#define KVM_EXIT_FAIL_ENTRY 9
#define KVM_EXIT_INTERNAL_ERROR 17
#define KVM_EXIT_SYSTEM_EVENT 24
#define KVM_EXIT_DIRTY_RING_FULL 31
#define KVM_DIRTY_LOG_PAGE_OFFSET ...
#define KVM_EXIT_IO_IN 0
#define KVM_EXIT_IO_OUT 1
#define KVM_INTERNAL_ERROR_EMULATION 1
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES 1

/* Flags and capabilities whose numbers backend.py states as well. */
#define KVM_API_VERSION 12
#define KVM_MEM_LOG_DIRTY_PAGES 1
#define KVM_MEM_READONLY 2
#define KVM_CAP_USER_MEMORY 3
#define KVM_CAP_NR_MEMSLOTS 10
#define KVM_CAP_COALESCED_MMIO 15
#define KVM_CAP_IOEVENTFD 36
#define KVM_CAP_READONLY_MEM 81
#define KVM_CAP_IOEVENTFD_NO_LENGTH 100
#define KVM_CAP_MULTI_ADDRESS_SPACE 118
#define KVM_CAP_IMMEDIATE_EXIT 136
#define KVM_CAP_COALESCED_PIO 162
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 168
#define KVM_CAP_DIRTY_LOG_RING 192
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223

/* For structs without a name cffi checks the size only; _source.c checks their members. */
struct kvm_run {
    uint8_t immediate_exit;
    uint32_t exit_reason;
    uint16_t flags;
    union {
        struct {
            uint64_t hardware_exit_reason;
        } hw;
        struct {
            uint8_t direction;
            uint8_t size;
            uint16_t port;
            uint32_t count;
            uint64_t data_offset;
        } io;
        struct {
            uint64_t phys_addr;
            uint8_t data[8];
            uint32_t len;
            uint8_t is_write;
        } mmio;
        struct {
            uint32_t suberror;
            uint32_t ndata;
            uint64_t data[16];
        } internal;
    };
    ...;
};

/* Each returns what the ioctl does (0 or a positive number), or -errno. */
int ml_get_api_version(int kvm);
int ml_get_vcpu_mmap_size(int kvm);
int ml_check_extension(int fd, int cap);
int ml_create_vm(int kvm);
int ml_create_vcpu(int vm, unsigned int id);
int ml_set_user_memory_region(int vm, uint32_t slot, uint32_t flags, uint64_t guest_phys_addr,
                              uint64_t memory_size, uint64_t userspace_addr);
int ml_get_dirty_log(int vm, uint32_t slot, void *bitmap);
int ml_clear_dirty_log(int vm, uint32_t slot, uint64_t first_page, uint32_t pages, void *bitmap);
int ml_enable_cap(int fd, uint32_t cap, uint64_t arg);
int ml_reset_dirty_rings(int vm);
int ml_kick_all_running_vcpus(int vm);
int ml_resume_all_kicked_vcpus(int vm);

/* On bitmaps with bit n in byte n / 8, at memory speed; see core/dirty.py. */
void ml_bitmap_or(uint8_t *dst, const uint8_t *src, size_t size);
/* How many bounds of runs of set bits there are; stored where bounds is not NULL. */
size_t ml_bitmap_bounds(const uint8_t *bitmap, size_t size, uint64_t base, uint64_t *bounds);

/* How many entries of a vCPU's dirty ring were new: slot and page of each are in found. */
uint32_t ml_collect_dirty_gfns(void *ring, uint32_t entries, uint32_t *next, uint64_t *found);
/* How many entries of a ring that has overflowed were passed over. */
uint32_t ml_skip_dirty_gfns(void *ring, uint32_t entries, uint32_t *next, uint32_t none);

/* ioeventfds, and writes that the kernel gathers in a ring. */
#define KVM_IOEVENTFD_FLAG_DATAMATCH ...
#define KVM_IOEVENTFD_FLAG_PIO ...
#define KVM_IOEVENTFD_FLAG_DEASSIGN ...
int ml_ioeventfd(int vm, uint64_t addr, uint32_t len, int fd, uint32_t flags, uint64_t datamatch);
int ml_register_coalesced_mmio(int vm, uint64_t addr, uint32_t size, uint32_t pio);
int ml_unregister_coalesced_mmio(int vm, uint64_t addr, uint32_t size, uint32_t pio);
/* How many entries wait in a ring that has room for so many. */
uint32_t ml_coalesced_count(const void *ring, uint32_t entries);
void ml_coalesced_take(void *ring, uint32_t entries, uint32_t count);

/* The signal's number, or -EBUSY when every real-time signal is taken. */
int ml_install_kick_handler(void);

/* 0 when the guest exited, else a positive errno. */
int ml_run(int vcpu, int *tid);
/* 0, or the errno with which the signal could not be sent. */
int ml_kick(struct kvm_run *run, int *tid);

/* Exits whose structs have grown over the years, so that cdef cannot state them. */
uint64_t ml_fail_entry_reason(const struct kvm_run *run);
uint32_t ml_fail_entry_cpu(const struct kvm_run *run);
uint32_t ml_system_event_type(const struct kvm_run *run);
/* How many words of the last system event were stored in data. */
int ml_system_event_data(const struct kvm_run *run, uint64_t data[16]);
