/* A stand-in for NeuroPilot's libneuron_adapter.so: it computes nothing and writes down what it is asked for.
 *
 * The functions are those that MediaTek's compiler plug-in for LiteRT looks up by name. Each line that is appended to
 * the file named by QAT_NEURON_RECORD is one call; qat/packages/neuron/record.py reads them. Scales are written with
 * nine digits, which a float needs to be read back; values of operands as their size and CRC-32.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { OK = 0, REFUSED = 4 };

typedef struct {
    int32_t type;
    uint32_t rank;
    const uint32_t* sizes;
    float scale;
    int32_t zero_point;
} OperandType;

typedef struct {
    uint32_t axis;
    uint32_t count;
    const float* scales;
} ChannelScales;

typedef struct {
    int operands;
} Model;

static const char MARK[] = "qat stand-in, nothing was compiled";

static FILE* record(void) {
    static FILE* file = NULL;
    if (file == NULL) {
        const char* path = getenv("QAT_NEURON_RECORD");
        file = path == NULL ? stderr : fopen(path, "a");
        if (file == NULL) file = stderr;
    }
    return file;
}

static uint32_t crc32(const unsigned char* bytes, size_t count) {
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < count; ++i) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
    }
    return ~crc;
}

static void write_numbers(const char* word, uint32_t count, const uint32_t* numbers) {
    fprintf(record(), " %s", word);
    for (uint32_t i = 0; i < count; ++i) fprintf(record(), " %u", numbers[i]);
}

API int Neuron_getVersion(uint8_t* version) {
    version[0] = 8; /* major, minor, patch: of the library that the plug-in was written for */
    version[1] = 2;
    version[2] = 0;
    return OK;
}

API int Neuron_getL1MemorySizeKb(uint32_t* size) {
    *size = 0;
    return OK;
}

API int NeuronModel_create(Model** model) {
    *model = calloc(1, sizeof(Model));
    if (*model == NULL) return REFUSED;
    fprintf(record(), "model\n");
    return OK;
}

API void NeuronModel_free(Model* model) { free(model); }

API int NeuronModel_finish(Model* model) {
    (void)model;
    fprintf(record(), "finish\n");
    return fflush(record()) == 0 ? OK : REFUSED;
}

API int NeuronModel_addOperand(Model* model, const OperandType* type) {
    fprintf(record(), "operand %d %d %.9g %d", model->operands++, type->type, (double)type->scale, type->zero_point);
    write_numbers("sizes", type->rank, type->sizes);
    fprintf(record(), "\n");
    return OK;
}

API int NeuronModel_setOperandValue(Model* model, int32_t index, const void* bytes, size_t count) {
    (void)model;
    /* an absent optional operand has no bytes */
    fprintf(record(), "value %d %zu %u\n", index, count, bytes == NULL ? 0u : crc32(bytes, count));
    return OK;
}

API int NeuronModel_setOperandSymmPerChannelQuantParams(Model* model, int32_t index, const ChannelScales* channels) {
    (void)model;
    fprintf(record(), "channels %d %u", index, channels->axis);
    for (uint32_t i = 0; i < channels->count; ++i) fprintf(record(), " %.9g", (double)channels->scales[i]);
    fprintf(record(), "\n");
    return OK;
}

API int NeuronModel_addOperation(Model* model, int32_t code, uint32_t input_count, const uint32_t* inputs,
                                 uint32_t output_count, const uint32_t* outputs) {
    (void)model;
    fprintf(record(), "operation %d", code);
    write_numbers("inputs", input_count, inputs);
    write_numbers("outputs", output_count, outputs);
    fprintf(record(), "\n");
    return OK;
}

API int NeuronModel_identifyInputsAndOutputs(Model* model, uint32_t input_count, const uint32_t* inputs,
                                             uint32_t output_count, const uint32_t* outputs) {
    (void)model;
    fprintf(record(), "borders");
    write_numbers("inputs", input_count, inputs);
    write_numbers("outputs", output_count, outputs);
    fprintf(record(), "\n");
    return OK;
}

API int NeuronModel_setName(Model* model, const char* name) {
    (void)model;
    (void)name;
    return OK;
}

API int NeuronModel_relaxComputationFloat32toFloat16(Model* model, bool allow) {
    (void)model;
    (void)allow; /* integers are not concerned */
    return OK;
}

API int NeuronCompilation_create(Model* model, void** compilation) {
    *compilation = model;
    return OK;
}

API int NeuronCompilation_createWithOptions(Model* model, void** compilation, const char* options) {
    (void)options;
    *compilation = model;
    return OK;
}

API int NeuronCompilation_finish(void* compilation) {
    (void)compilation;
    return OK;
}

API void NeuronCompilation_free(void* compilation) { (void)compilation; }

API int NeuronCompilation_getSupportedOperations(void* compilation, uint32_t count, bool* supported) {
    (void)compilation;
    /* what an APU supports is not known here: so everything that the plug-in can spell is let through */
    for (uint32_t i = 0; i < count; ++i) supported[i] = true;
    return OK;
}

API int NeuronCompilation_getCompiledNetworkSize(void* compilation, size_t* size) {
    (void)compilation;
    *size = sizeof MARK;
    return OK;
}

API int NeuronCompilation_storeCompiledNetwork(void* compilation, void* bytes, size_t size) {
    (void)compilation;
    if (size < sizeof MARK) return REFUSED;
    memcpy(bytes, MARK, sizeof MARK);
    return OK;
}

#define SETTING(name, type)                        \
    API int name(void* compilation, type value) { \
        (void)compilation;                         \
        (void)value;                               \
        return OK;                                 \
    }
SETTING(NeuronCompilation_setL1MemorySizeKb, uint32_t)
SETTING(NeuronCompilation_setOptimizationHint, uint32_t)
SETTING(NeuronCompilation_setOptimizationString, const char*)
SETTING(NeuronCompilation_setPreference, int32_t)
SETTING(NeuronCompilation_setPriority, int32_t)

/* Looked up and never called in a compilation: extensions, reloading, execution. */
#define ABSENT(name) \
    API int name(void) { return REFUSED; }
ABSENT(NeuronModel_getExtensionOperandType)
ABSENT(NeuronModel_getExtensionOperationType)
ABSENT(NeuronModel_restoreFromCompiledNetwork)
ABSENT(NeuronModel_setOperandPerChannelQuantParams)
ABSENT(NeuronCompilation_getInputPaddedDimensions)
ABSENT(NeuronCompilation_getInputPaddedSize)
ABSENT(NeuronCompilation_getOutputPaddedDimensions)
ABSENT(NeuronCompilation_getOutputPaddedSize)
ABSENT(NeuronExecution_compute)
ABSENT(NeuronExecution_create)
ABSENT(NeuronExecution_free)
ABSENT(NeuronExecution_setBoostHint)
ABSENT(NeuronExecution_setConfig)
ABSENT(NeuronExecution_setInputFromMemory)
ABSENT(NeuronExecution_setOutputFromMemory)
ABSENT(NeuronMemory_createFromAHardwareBuffer)
ABSENT(NeuronMemory_createFromFd)
ABSENT(NeuronMemory_free)
