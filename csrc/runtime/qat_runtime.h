/* The runner of integer networks: a C API without dependencies, for C, C++, Python's ctypes and others.
 *
 * A plan is a network from a file (docs/plan_format.md). A session runs it for one batch size and one number of
 * threads.
 *
 *   qat_plan* plan;
 *   if (qat_plan_load(bytes, size, &plan) != QAT_OK) puts(qat_last_error());
 *   qat_session* session;
 *   if (qat_session_create(plan, 1, NULL, &session) != QAT_OK) puts(qat_last_error());
 *   qat_session_run(session, inputs, outputs);
 *
 * Errors: functions that can fail return a status; qat_last_error() then has the message of the calling thread, which
 * names the tensor or operator, the cause and the mend. No function throws or aborts, whatever the file holds.
 *
 * Threads: a plan never changes, and any number of threads may use it at once. A session has memory of its own: one
 * thread at a time may use it, any number may use sessions of the same plan.
 *
 * Ownership: what *_create and *_load return belongs to the caller until the *_free of its kind, which takes NULL too.
 * A plan may be freed before its sessions. Names live as long as their plan. */
#ifndef QAT_RUNTIME_H
#define QAT_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define QAT_API
#else
#define QAT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header: raised when a declaration changes. */
#define QAT_RUNTIME_VERSION 1

typedef enum qat_status {
  QAT_OK = 0,
  QAT_INVALID_ARGUMENT = 1,    /* of the caller: a null pointer, a batch size of 0, an unknown instruction set */
  QAT_NOT_A_PLAN = 2,          /* the bytes are something else */
  QAT_UNSUPPORTED_VERSION = 3, /* written for another version of the runner */
  QAT_TRUNCATED = 4,           /* the bytes end before the plan does */
  QAT_CORRUPT = 5,             /* the checksum is wrong */
  QAT_INVALID_PLAN = 6,        /* the parts of the plan contradict each other, or what a runner can do */
  QAT_OUT_OF_MEMORY = 7,       /* of the machine, or above qat_options.memory_limit */
  QAT_INTERNAL = 8             /* a mistake of this library, or of the system (no thread could be started) */
} qat_status;

/* Types of elements; the values are those of the plan file. */
typedef enum qat_type { QAT_U8 = 1, QAT_S8 = 2, QAT_U16 = 3, QAT_S16 = 4, QAT_S32 = 5, QAT_F32 = 6 } qat_type;

typedef struct qat_plan qat_plan;
typedef struct qat_session qat_session;

/* An input or output of a plan. Memory is dense and row-major in the order of `sizes`, which is the physical one:
 * tensors with spatial dimensions are channels last, if they are codes. A size of -k is k times the batch size. For
 * codes, real = scale * (code - zero_point), qmin <= code <= qmax; the four are 0 for QAT_F32 and QAT_S32. */
typedef struct qat_tensor_info {
  const char* name;
  int32_t type; /* qat_type */
  int32_t rank; /* at most 8 */
  int64_t sizes[8];
  float scale;
  int32_t zero_point, qmin, qmax;
} qat_tensor_info;

/* Work for [begin, end). */
typedef void (*qat_task)(int64_t begin, int64_t end, void* task_context);
/* Calls the task for parts of [begin, end) that are together all of it and at least `grain` long (but the last), on any
 * threads, and returns when all have returned. The result does not depend on the parts. */
typedef void (*qat_parallel)(void* context, int64_t begin, int64_t end, int64_t grain, qat_task task,
                             void* task_context);

/* Options of a session; all zeros are the defaults. */
typedef struct qat_options {
  const char* isa;      /* "portable", "avx2", ...; NULL or "": the best that the processor has */
  int32_t threads;      /* into how many parts work is cut, at most 1024; 0 is 1 */
  int32_t flags;        /* QAT_POISON, QAT_UNCHECKED_ISA or 0 */
  qat_parallel parallel; /* NULL: threads of the session itself, threads - 1 of them */
  void* parallel_context;
  int64_t memory_limit; /* in bytes, of what qat_session_arena_bytes counts; 0: none */
} qat_options;

/* Fills the memory for intermediate tensors with 0xAA before every run, so that tests notice what reads too early. */
#define QAT_POISON 1
/* Takes the `isa` that is named although the processor may lack it, and then dies of an illegal instruction: for tests
 * of the choice. */
#define QAT_UNCHECKED_ISA 2

/* Message of the last call of this thread that failed; "" before the first. Valid until the next failure. */
QAT_API const char* qat_last_error(void);
/* "QAT_OK", ...; "unknown status" for others. */
QAT_API const char* qat_status_name(int status);
/* QAT_RUNTIME_VERSION of the library. */
QAT_API int qat_runtime_version(void);
/* The instruction set that `isa` (NULL or "": the best) stands for on this processor; NULL if it cannot run. */
QAT_API const char* qat_find_isa(const char* isa);

/* Loads and checks a plan. The bytes are copied and need no alignment. */
QAT_API int qat_plan_load(const void* bytes, size_t size, qat_plan** plan);
QAT_API void qat_plan_free(qat_plan* plan);
QAT_API int32_t qat_plan_inputs(const qat_plan* plan);
QAT_API int32_t qat_plan_outputs(const qat_plan* plan);
/* QAT_INVALID_ARGUMENT for an index outside of [0, count). */
QAT_API int qat_plan_input(const qat_plan* plan, int32_t index, qat_tensor_info* info);
QAT_API int qat_plan_output(const qat_plan* plan, int32_t index, qat_tensor_info* info);
/* The codes of a border, with the sizes of the border: its own or, where it is float, those that it is quantized to
 * before anything else, or was dequantized from. QAT_INVALID_ARGUMENT where there are none, or several grids. */
QAT_API int qat_plan_input_codes(const qat_plan* plan, int32_t index, qat_tensor_info* info);
QAT_API int qat_plan_output_codes(const qat_plan* plan, int32_t index, qat_tensor_info* info);
/* Between floats and codes of a border, element by element, as the operators quantize and dequantize of a plan do it: a
 * division, half to even, nan becomes qmin. */
QAT_API int qat_quantize(const qat_tensor_info* info, const float* values, int64_t count, void* codes);
QAT_API int qat_dequantize(const qat_tensor_info* info, const void* codes, int64_t count, float* values);
QAT_API int32_t qat_plan_operators(const qat_plan* plan);
/* In order of execution; NULL for an index outside of [0, count). The kind is as in docs/plan_format.md, "conv" say. */
QAT_API const char* qat_plan_operator_name(const qat_plan* plan, int32_t index);
QAT_API const char* qat_plan_operator_kind(const qat_plan* plan, int32_t index);

/* Plans the memory for a batch size, packs weights (once for all sessions of a plan) and starts threads. `options` may
 * be NULL and is not kept; its parallel_context must live as long as the session. */
QAT_API int qat_session_create(const qat_plan* plan, int64_t batch, const qat_options* options, qat_session** session);
QAT_API void qat_session_free(qat_session* session);
/* One pointer an input and an output, to as many elements as their sizes say, aligned to the size of an element.
 * Outputs are written, whole; nothing else of the caller's memory is, and nothing outside of the inputs is read.
 * Outputs must not overlap each other or inputs. Allocates nothing. */
QAT_API int qat_session_run(qat_session* session, const void* const* inputs, void* const* outputs);
/* Bytes for intermediate tensors and scratch, which live in one block. */
QAT_API int64_t qat_session_arena_bytes(const qat_session* session);
/* The instruction set in use; lives as long as the library. */
QAT_API const char* qat_session_isa(const qat_session* session);
/* Starts (1) or stops (0) measuring; starting sets all times to 0. */
QAT_API int qat_session_profile(qat_session* session, int on);
/* Nanoseconds of each operator, summed over the runs since the start of measuring; 0 for what costs nothing
 * (reshape). */
QAT_API int qat_session_times(const qat_session* session, int64_t* nanoseconds);

#ifdef __cplusplus
}
#endif
#endif
