/*
 * fusedmerge: the C interface. docs/cpp.md shows its use, docs/kernels/switch.md tells what the kernel does.
 *
 *     live[s] = round(base[s] + sum over slots j of gates[j] * scaling[s][ids[j]] * B[s][ids[j]] A[s][ids[j]])      for every target s
 *
 *   fusedmerge_device_query          what a plan needs to know of a device                       CUDA
 *   fusedmerge_switch_plan_create    check the targets, plan the launch                          host only
 *   fusedmerge_switch_plan_query     sizes: workspace, traffic, grid                             host only
 *   fusedmerge_switch_init           fill the caller's workspace; "no mixture is known"          CUDA
 *   fusedmerge_switch_run            one launch: the weights take on the mixture                 CUDA, may be captured in a graph
 *   fusedmerge_switch_invalidate     the next run writes, even if its mixture is the last one    CUDA, may be captured in a graph
 *   fusedmerge_switch_read_state     wait; what is merged, and errors found on the device        CUDA
 *   fusedmerge_switch_plan_destroy   free the plan                                               host only
 *
 * Rules. Every function but the first few below returns a fusedmerge_result; after anything but FUSEDMERGE_OK,
 * fusedmerge_last_error() tells this thread what operation refused which field, what it expected and what it got, and nothing was launched.
 * Nothing throws. The library keeps no device memory: the caller allocates the workspace, and no call allocates on the device.
 * Work goes to the caller's stream, on the current device, which must be the one that the pointers belong to. A plan is immutable and may
 * be used by several threads; a workspace belongs to one stream at a time. Strides count elements. This header needs no CUDA header.
 */
#ifndef FUSEDMERGE_FUSEDMERGE_H
#define FUSEDMERGE_FUSEDMERGE_H

#include <stddef.h>
#include <stdint.h>

#define FUSEDMERGE_VERSION_MAJOR 0
#define FUSEDMERGE_VERSION_MINOR 1
#define FUSEDMERGE_VERSION_PATCH 0
#define FUSEDMERGE_VERSION (FUSEDMERGE_VERSION_MAJOR * 10000 + FUSEDMERGE_VERSION_MINOR * 100 + FUSEDMERGE_VERSION_PATCH)

#if defined(__GNUC__)
#define FUSEDMERGE_API __attribute__((visibility("default")))
#else
#define FUSEDMERGE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;
typedef struct CUstream_st* fusedmerge_stream; /* cudaStream_t */

typedef enum fusedmerge_result {
    FUSEDMERGE_OK = 0,
    FUSEDMERGE_INVALID_ARGUMENT = 1,
    FUSEDMERGE_OUT_OF_MEMORY = 2, /* host memory */
    FUSEDMERGE_NOT_AVAILABLE = 3, /* the library was built without CUDA */
    FUSEDMERGE_CUDA_ERROR = 4,    /* the CUDA runtime reported an error */
    FUSEDMERGE_INTERNAL_ERROR = 5
} fusedmerge_result;

typedef enum fusedmerge_dtype {
    FUSEDMERGE_BF16 = 0,
    FUSEDMERGE_FP16 = 1,
    FUSEDMERGE_FLOAT32 = 2,
    FUSEDMERGE_FP8_E4M3 = 3
} fusedmerge_dtype;

typedef enum fusedmerge_mode {
    FUSEDMERGE_EXACT = 0,  /* live = base + new: no drift, needs a pristine base */
    FUSEDMERGE_INPLACE = 1 /* live += new - last: no base, drifts by one rounding for each switch */
} fusedmerge_mode;

enum {
    FUSEDMERGE_MAX_SLOTS = 32 /* slots of a mixture */,
    FUSEDMERGE_RANK_STEP = 16 /* banks pad ranks to a multiple of this with zeros */
};

/* ------------------------------------------------------------------ about the library; never fail */

FUSEDMERGE_API int fusedmerge_version(void);  /* FUSEDMERGE_VERSION of the library, not of the header */
FUSEDMERGE_API int fusedmerge_has_cuda(void); /* 1: it contains kernels; 0: the functions marked CUDA return FUSEDMERGE_NOT_AVAILABLE */
FUSEDMERGE_API const char* fusedmerge_result_name(fusedmerge_result result); /* "FUSEDMERGE_OK", ... */
FUSEDMERGE_API const char* fusedmerge_last_error(void); /* of this thread's last failed call; "" before any; valid until its next one */

/* ------------------------------------------------------------------ the plan */

typedef struct fusedmerge_device {
    int32_t num_multiprocessors;
    int32_t shared_bytes_per_block; /* opt-in limit: 101376 on sm_86, sm_89 and sm_120; 166912 on sm_80; 232448 on sm_90 and sm_100 */
} fusedmerge_device;

/* The two figures of CUDA device `ordinal`. They may also be filled in by hand, to plan without a GPU. */
FUSEDMERGE_API fusedmerge_result fusedmerge_device_query(int ordinal, fusedmerge_device* device);

/* One adapted matrix. Pointers are device pointers, not followed on the host. N adapters, rank r padded to a multiple of 16. */
typedef struct fusedmerge_switch_target {
    void* live;              /* [rows, cols]; the weights that the model reads. No two targets may overlap */
    const void* base;        /* [rows, cols]; exact: the pristine weights, apart from live. In place: null */
    const void* a;           /* [N, r, cols] */
    const void* b;           /* [N, rows, r] */
    const float* scaling;    /* [N]; alpha / r, or as the adapter says */
    const int32_t* ranks;    /* [N]; an adapter's own rank here, 0 = it has none. Null: r for all */
    const float* base_scale; /* [(rows - 1 >> base_scale_row_shift) + 1, (cols - 1 >> base_scale_col_shift) + 1] of an fp8 base; null = 1 */
    int64_t live_stride;     /* between rows; at least cols */
    int64_t base_stride;     /* between rows */
    int64_t a_adapter_stride; /* between adapters */
    int64_t a_row_stride;     /* between ranks */
    int64_t b_adapter_stride;
    int64_t b_row_stride;
    int64_t base_scale_stride; /* between rows of scales */
    int32_t rows;
    int32_t cols;
    int32_t rank;                 /* r */
    int32_t base_scale_row_shift; /* log2 of the rows that share a scale: 0 per row, 7 for 128x128 blocks, 31 one scale for all rows */
    int32_t base_scale_col_shift; /* log2 of the columns that share a scale: 3 to 31 */
    int32_t reserved;             /* 0 */
} fusedmerge_switch_target;

/* Start from FUSEDMERGE_SWITCH_OPTIONS_INIT, so that fields of later versions have their defaults. */
typedef struct fusedmerge_switch_options {
    size_t options_size;  /* sizeof(fusedmerge_switch_options) */
    size_t target_size;   /* sizeof(fusedmerge_switch_target) */
    int32_t mode;         /* fusedmerge_mode */
    int32_t safe;         /* 1: report weights that are not finite (FUSEDMERGE_STATE_NON_FINITE) */
    int32_t live_dtype;   /* fusedmerge_dtype: bf16, fp16 or float32 */
    int32_t base_dtype;   /* live's, float32, or fp8 e4m3; any for float32 live; in place: live's */
    int32_t factor_dtype; /* of a and b: live's (tensor cores, where 16 bits wide) or float32 */
    int32_t num_adapters; /* N */
    int32_t max_slots;    /* the most slots of a run, up to FUSEDMERGE_MAX_SLOTS */
    int32_t reserved;     /* 0 */
    fusedmerge_device device;
} fusedmerge_switch_options;

#define FUSEDMERGE_SWITCH_OPTIONS_INIT  \
    {sizeof(fusedmerge_switch_options), \
     sizeof(fusedmerge_switch_target),  \
     FUSEDMERGE_EXACT,                  \
     0,                                 \
     FUSEDMERGE_BF16,                   \
     FUSEDMERGE_BF16,                   \
     FUSEDMERGE_BF16,                   \
     1,                                 \
     FUSEDMERGE_MAX_SLOTS,              \
     0,                                 \
     {0, 0}}

typedef struct fusedmerge_switch_plan fusedmerge_switch_plan;

/* Checks and copies the descriptions; on success *plan is the caller's to destroy, else it is null. */
FUSEDMERGE_API fusedmerge_result fusedmerge_switch_plan_create(const fusedmerge_switch_options* options,
                                                               const fusedmerge_switch_target* targets, int32_t num_targets,
                                                               fusedmerge_switch_plan** plan);
FUSEDMERGE_API void fusedmerge_switch_plan_destroy(fusedmerge_switch_plan* plan); /* null is fine; launched runs do not need it */

typedef struct fusedmerge_switch_figures {
    int64_t workspace_bytes; /* device memory that the caller provides */
    int64_t live_bytes;      /* written by a switch */
    int64_t base_bytes;      /* read by a switch, scales included */
    int64_t adapter_bytes;   /* read for each chosen adapter of full rank */
    int64_t bank_bytes;      /* a and b of all adapters */
    int64_t num_units;       /* pieces of work */
    int32_t grid;            /* blocks */
    int32_t shared_bytes;    /* of a block */
} fusedmerge_switch_figures;

FUSEDMERGE_API fusedmerge_result fusedmerge_switch_plan_query(const fusedmerge_switch_plan* plan, fusedmerge_switch_figures* figures);

/* ------------------------------------------------------------------ on the device */

/* Readies `workspace` (device memory, 16-byte aligned, at least workspace_bytes) and the current device's kernel. The state becomes: no
   mixture, nothing written yet; in place that means that live holds the base. Once before the first run; not in a graph capture. */
FUSEDMERGE_API fusedmerge_result fusedmerge_switch_init(const fusedmerge_switch_plan* plan, void* workspace, size_t workspace_bytes,
                                                        fusedmerge_stream stream);

/* Sets the mixture of `num_slots` slots: ids [num_slots] (-1 = empty slot) and gates [num_slots], both on the device and read there, when
   the launch runs. No slots: back to the base. Duplicates add. The mixture that is merged already costs a read of the state. An id outside
   [-1, N) or a gate that is not finite changes no weight and sets a flag of the state. */
FUSEDMERGE_API fusedmerge_result fusedmerge_switch_run(const fusedmerge_switch_plan* plan, void* workspace, const int32_t* ids,
                                                       const float* gates, int32_t num_slots, fusedmerge_stream stream);

/* Exact: the next run writes every weight. In place a run adds differences, so use fusedmerge_switch_init once live holds the base. */
FUSEDMERGE_API fusedmerge_result fusedmerge_switch_invalidate(const fusedmerge_switch_plan* plan, void* workspace,
                                                              fusedmerge_stream stream);

enum { FUSEDMERGE_STATE_BAD_ID = 1, FUSEDMERGE_STATE_BAD_GATE = 2, FUSEDMERGE_STATE_NON_FINITE = 4 };

typedef struct fusedmerge_switch_state {
    int32_t valid;      /* 0: nothing was written since init or invalidate */
    int32_t num_active; /* adapters of the mixture that is merged */
    int32_t flags;      /* FUSEDMERGE_STATE_*, of all runs since they were last read */
    int32_t ids[FUSEDMERGE_MAX_SLOTS];
    float gates[FUSEDMERGE_MAX_SLOTS];
} fusedmerge_switch_state;

/* Waits for the stream; then clears the flags. */
FUSEDMERGE_API fusedmerge_result fusedmerge_switch_read_state(const fusedmerge_switch_plan* plan, void* workspace,
                                                              fusedmerge_switch_state* state, fusedmerge_stream stream);

#ifdef __cplusplus
}
#endif

#endif /* FUSEDMERGE_FUSEDMERGE_H */
