/* A simulated libnvidia-ml.so.1: GPUs whose true energy is known, for tests of what is measured through NVML.
 *
 * Each GPU draws idle + dynamic + leakage watts: the dynamic part follows the load with a ramp, the leakage follows the
 * temperature, which follows the power. NVML shows of it
 *   - an energy counter, published on its tick, with a gain error,
 *   - instant power (field 186): the mean of the first 25 ms of each 100 ms,
 *   - average power (field 185 and nvmlDeviceGetPowerUsage): the mean of the last second, published every 100 ms.
 * Time is virtual, and moved by simulation_advance(), or real. Everything else is set by commands, in process through
 * simulation_command() or from the file that the environment variable NVML_SIMULATION names:
 *
 *   clock virtual|real
 *   gpus COUNT                                    starts anew: time 0, new GPUs, no faults, nothing timed
 *   gpu INDEX name|uuid TEXT
 *   gpu INDEX PARAMETER NUMBER                    one of `parameters` below; tick and phases before time passes
 *   gpu INDEX counter MILLIJOULES                 what the energy counter stands at now
 *   gpu INDEX process PID
 *   fault FUNCTION INDEX CODE FIRST COUNT         calls FIRST, FIRST + 1, ... from now on return CODE, COUNT of them
 *   heal                                          ends all faults
 *   at SECONDS COMMAND                            carries out the command at that time
 *
 * FUNCTION is a function's name, field:ID for one entry of nvmlDeviceGetFieldValues, or * for all that take a device;
 * INDEX -1 is any GPU. Structures and codes are those of NVIDIA's nvml.h as nvidia-ml-py declares them.
 */
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_GPUS = 8, MAX_FAULTS = 64, MAX_TIMED = 64, MAX_PROCESSES = 8, LINE = 256, SECOND = 10 };

static const double STEP = 1e-3, SAMPLE_PERIOD = 0.1, SAMPLE_LENGTH = 0.025;

typedef struct {
    /* set by commands */
    char name[96], uuid[96];
    double idle, load, ramp;                      /* W, W, s */
    double ambient, heating, inertia, leakage;    /* degrees, K/W, s, W/K */
    double module;                                /* W of the rest of a Grace module; 0 for a board */
    double tick, phase, gain, frozen, sampled;    /* of the counter: s, s, factor; stands still; adds up samples only */
    double sample_phase, power_gain;              /* of both powers: s, factor */
    double limit, sm_clock, memory_clock, throttle, persistence, mig;
    double counter_origin;                        /* mJ */
    unsigned processes[MAX_PROCESSES], process_count;
    /* state */
    double time, dynamic, temperature, energy, seen, sample_energy;
    int64_t ticks, sample_begins, sample_ends;
    double counter, instant, average;             /* as published: mJ, W, W */
    double history[SECOND];                       /* energy at the last ten publications of the average */
} Gpu;

static const struct { const char *name; size_t offset; } parameters[] = {
    {"idle", offsetof(Gpu, idle)},         {"load", offsetof(Gpu, load)},
    {"ramp", offsetof(Gpu, ramp)},         {"ambient", offsetof(Gpu, ambient)},
    {"heating", offsetof(Gpu, heating)},   {"inertia", offsetof(Gpu, inertia)},
    {"leakage", offsetof(Gpu, leakage)},   {"module", offsetof(Gpu, module)},
    {"tick", offsetof(Gpu, tick)},         {"phase", offsetof(Gpu, phase)},
    {"gain", offsetof(Gpu, gain)},         {"frozen", offsetof(Gpu, frozen)},
    {"sampled", offsetof(Gpu, sampled)},   {"sample_phase", offsetof(Gpu, sample_phase)},
    {"power_gain", offsetof(Gpu, power_gain)}, {"limit", offsetof(Gpu, limit)},
    {"sm_clock", offsetof(Gpu, sm_clock)}, {"memory_clock", offsetof(Gpu, memory_clock)},
    {"throttle", offsetof(Gpu, throttle)}, {"persistence", offsetof(Gpu, persistence)},
    {"mig", offsetof(Gpu, mig)},           {"temperature", offsetof(Gpu, temperature)},
};

typedef struct { char function[64]; int gpu, code; long first, count, calls; } Fault;
typedef struct { double time; char command[LINE]; } Timed;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Gpu gpus[MAX_GPUS];
static Fault faults[MAX_FAULTS];
static Timed timed[MAX_TIMED];
static int gpu_count, fault_count, timed_count, references, real_time;
static double now, origin;

static void fail(const char *what, const char *line) {
    fprintf(stderr, "simulated NVML: %s: %s\n", what, line);
    abort();
}

static double monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the model ---- */

static double leakage_watts(const Gpu *g) { return g->leakage * (g->temperature - g->ambient); }
static double watts(const Gpu *g) { return g->idle + g->module + g->dynamic + leakage_watts(g); }

static void publish_counter(Gpu *g) {
    if (!g->frozen) g->counter = g->counter_origin + 1e3 * g->gain * (g->sampled ? g->seen : g->energy);
}

static void begin_sample(Gpu *g) {
    int64_t oldest = g->sample_begins % SECOND;
    int64_t published = g->sample_begins < SECOND ? g->sample_begins : SECOND;
    if (published) {
        double since = g->history[g->sample_begins < SECOND ? 0 : oldest];
        g->average = (g->energy - since) / ((double)published * SAMPLE_PERIOD);
    }
    g->history[oldest] = g->energy;
    g->sample_energy = g->energy;
    g->sample_begins++;
}

static void end_sample(Gpu *g) {
    double mean = (g->energy - g->sample_energy) / SAMPLE_LENGTH;
    g->seen += mean * SAMPLE_PERIOD;
    g->instant = mean;
    g->sample_ends++;
}

static void advance_gpu(Gpu *g, double until) {
    while (g->time < until) {
        double tick = g->phase + (double)g->ticks * g->tick;
        double begin = g->sample_phase + (double)g->sample_begins * SAMPLE_PERIOD;
        double end = g->sample_phase + (double)g->sample_ends * SAMPLE_PERIOD + SAMPLE_LENGTH;
        double next = fmin(fmin(until, g->time + STEP), fmin(fmin(tick, begin), end));
        double dt = fmax(next - g->time, 0);
        g->dynamic += (g->load - g->dynamic) * (g->ramp > 0 ? 1 - exp(-dt / g->ramp) : 1);
        g->energy += dt * watts(g);
        g->temperature += (g->ambient + g->heating * watts(g) - g->temperature) * (1 - exp(-dt / g->inertia));
        g->time = fmax(next, g->time);
        if (g->time >= tick) { publish_counter(g); g->ticks++; }
        if (g->time >= begin) begin_sample(g);
        if (g->time >= end) end_sample(g);
    }
}

static void command(const char *line);

static void advance(double until) {
    for (;;) {
        int first = -1;
        for (int i = 0; i < timed_count; i++)
            if (timed[i].time <= until && (first < 0 || timed[i].time < timed[first].time)) first = i;
        double next = first < 0 ? until : fmax(timed[first].time, now);
        for (int i = 0; i < gpu_count; i++) advance_gpu(&gpus[i], next);
        now = next;
        if (first < 0) return;
        Timed due = timed[first];
        timed[first] = timed[--timed_count];
        command(due.command);
    }
}

static void catch_up(void) {
    if (real_time) advance(monotonic() - origin);
}

/* ---- commands ---- */

static void start_anew(int count) {
    if (count < 0 || count > MAX_GPUS) fail("no such number of GPUs", "gpus");
    gpu_count = count;
    fault_count = timed_count = 0;
    now = 0;
    origin = monotonic();
    for (int i = 0; i < count; i++) {
        Gpu *g = &gpus[i];
        *g = (Gpu){.idle = 70, .ramp = 0.02, .ambient = 30, .heating = 0.08, .inertia = 20, .leakage = 0.2,
                   .tick = 0.1, .gain = 1, .power_gain = 1, .limit = 700, .sm_clock = 1980, .memory_clock = 2619,
                   .persistence = 1, .counter_origin = 123456789};
        snprintf(g->name, sizeof g->name, "NVIDIA Simulated GPU");
        snprintf(g->uuid, sizeof g->uuid, "GPU-%08d-0000-4000-8000-000000000000", i);
        /* idle for long: as warm as its power keeps it */
        g->temperature = g->ambient + g->heating * g->idle / (1 - g->heating * g->leakage);
        g->instant = g->average = watts(g);
        g->counter = g->counter_origin;
    }
}

static void set_gpu(Gpu *g, const char *key, const char *value) {
    double number = atof(value);
    if (!strcmp(key, "name")) { snprintf(g->name, sizeof g->name, "%s", value); return; }
    if (!strcmp(key, "uuid")) { snprintf(g->uuid, sizeof g->uuid, "%s", value); return; }
    if (!strcmp(key, "process") && g->process_count < MAX_PROCESSES) {
        g->processes[g->process_count++] = (unsigned)number;
        return;
    }
    if (!strcmp(key, "counter")) {
        g->counter_origin += number - (g->counter_origin + 1e3 * g->gain * (g->sampled ? g->seen : g->energy));
        g->counter = number;
        return;
    }
    for (size_t i = 0; i < sizeof parameters / sizeof *parameters; i++)
        if (!strcmp(key, parameters[i].name)) {
            *(double *)((char *)g + parameters[i].offset) = number;
            return;
        }
    fail("unknown parameter", key);
}

static void command(const char *line) {
    char verb[16], key[64], value[96];
    int index, code, read = 0;
    long first, count;
    double time;
    if (sscanf(line, " %15s %n", verb, &read) != 1) fail("no command", line);
    const char *rest = line + read;
    if (!strcmp(verb, "clock")) {
        real_time = !strncmp(rest, "real", 4);
        origin = monotonic() - now;
    } else if (!strcmp(verb, "gpus") && sscanf(rest, "%d", &index) == 1) {
        start_anew(index);
    } else if (!strcmp(verb, "gpu") && sscanf(rest, "%d %63s %95[^\n]", &index, key, value) == 3) {
        if (index < 0 || index >= gpu_count) fail("no such GPU", line);
        set_gpu(&gpus[index], key, value);
    } else if (!strcmp(verb, "fault") && sscanf(rest, "%63s %d %d %ld %ld", key, &index, &code, &first, &count) == 5) {
        if (fault_count == MAX_FAULTS) fail("too many faults", line);
        Fault *f = &faults[fault_count++];
        *f = (Fault){.gpu = index, .code = code, .first = first, .count = count};
        snprintf(f->function, sizeof f->function, "%s", key);
    } else if (!strcmp(verb, "heal")) {
        fault_count = 0;
    } else if (!strcmp(verb, "at") && sscanf(rest, "%lf %n", &time, &read) == 1) {
        if (timed_count == MAX_TIMED) fail("too much is timed", line);
        timed[timed_count].time = time;
        snprintf(timed[timed_count++].command, LINE, "%s", rest + read);
    } else {
        fail("unknown command", line);
    }
}

EXPORT void simulation_command(const char *line) {
    pthread_mutex_lock(&mutex);
    catch_up();
    command(line);
    pthread_mutex_unlock(&mutex);
}

EXPORT void simulation_advance(double seconds) {
    pthread_mutex_lock(&mutex);
    advance(now + seconds);
    pthread_mutex_unlock(&mutex);
}

EXPORT double simulation_time(void) {
    pthread_mutex_lock(&mutex);
    catch_up();
    double time = now;
    pthread_mutex_unlock(&mutex);
    return time;
}

/* Watts that work adds to GPU `index` from now on, beyond its idle power. */
EXPORT void simulation_load(int index, double load) {
    pthread_mutex_lock(&mutex);
    catch_up();
    if (index < 0 || index >= gpu_count) fail("no such GPU", "simulation_load");
    gpus[index].load = load;
    pthread_mutex_unlock(&mutex);
}

/* The truth: joules since the start. */
EXPORT double simulation_energy(int index) {
    pthread_mutex_lock(&mutex);
    catch_up();
    if (index < 0 || index >= gpu_count) fail("no such GPU", "simulation_energy");
    double energy = gpus[index].energy;
    pthread_mutex_unlock(&mutex);
    return energy;
}

/* How often NVML is initialised and not shut down. */
EXPORT int simulation_references(void) { return references; }

__attribute__((constructor)) static void run_script(void) {
    start_anew(1);
    const char *path = getenv("NVML_SIMULATION");
    if (!path) return;
    char line[LINE];
    FILE *script = fopen(path, "r");
    if (!script) fail("cannot open", path);
    while (fgets(line, sizeof line, script)) {
        line[strcspn(line, "\n")] = 0;
        if (line[strspn(line, " ")] && line[0] != '#') command(line);
    }
    fclose(script);
}

/* ---- NVML ---- */

static int faulty(const char *function, const Gpu *g) {
    int code = SUCCESS;
    for (int i = 0; i < fault_count; i++) {
        Fault *f = &faults[i];
        int meant = !strcmp(f->function, function) || (g && !strcmp(f->function, "*"));
        if (!meant || (g && f->gpu >= 0 && g != &gpus[f->gpu])) continue;
        long call = f->calls++;
        if (call >= f->first && call - f->first < f->count) code = f->code;
    }
    return code;
}

/* Locks; to be followed by leave(). */
static int enter(const char *function, const Gpu *g) {
    pthread_mutex_lock(&mutex);
    catch_up();
    if (references == 0) return UNINITIALIZED;
    return faulty(function, g);
}

static int enter_device(const char *function, const Gpu *g) {
    int code = enter(function, g);
    return code ? code : g >= gpus && g < gpus + gpu_count ? SUCCESS : INVALID_ARGUMENT;
}

static int leave(int code) {
    pthread_mutex_unlock(&mutex);
    return code;
}

static int copy_text(char *to, unsigned length, const char *text) {
    if (strlen(text) >= length) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

static unsigned milli(double value) { return (unsigned)(1e3 * value + 0.5); }

EXPORT int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&mutex);
    int code = faulty("nvmlInitWithFlags", NULL);
    if (!code) references++;
    return leave(code);
}

EXPORT int nvmlShutdown(void) {
    int code = enter("nvmlShutdown", NULL);
    if (!code) references--;
    return leave(code);
}

EXPORT const char *nvmlErrorString(int code) {
    (void)code;
    return "error of the simulated NVML";
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    int code = enter(__func__, NULL);
    return leave(code ? code : copy_text(version, length, "580.00.simulated"));
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    int code = enter(__func__, NULL);
    if (!code) *count = (unsigned)gpu_count;
    return leave(code);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **device) {
    int exists = index < (unsigned)gpu_count;
    int code = enter(__func__, exists ? &gpus[index] : NULL);
    if (!code && !exists) code = INVALID_ARGUMENT;
    if (!code) *device = &gpus[index];
    return leave(code);
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **device) {
    int code = enter(__func__, NULL);
    if (code) return leave(code);
    for (int i = 0; i < gpu_count; i++)
        if (!strcmp(gpus[i].uuid, uuid)) {
            *device = &gpus[i];
            return leave(SUCCESS);
        }
    return leave(NOT_FOUND);
}

EXPORT int nvmlDeviceGetName(Gpu *g, char *name, unsigned length) {
    int code = enter_device(__func__, g);
    return leave(code ? code : copy_text(name, length, g->name));
}

EXPORT int nvmlDeviceGetUUID(Gpu *g, char *uuid, unsigned length) {
    int code = enter_device(__func__, g);
    return leave(code ? code : copy_text(uuid, length, g->uuid));
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(Gpu *g, uint64_t *millijoules) {
    int code = enter_device(__func__, g);
    if (!code) *millijoules = (uint64_t)g->counter;
    return leave(code);
}

EXPORT int nvmlDeviceGetPowerUsage(Gpu *g, unsigned *milliwatts) {
    int code = enter_device(__func__, g);
    if (!code) *milliwatts = milli(g->power_gain * g->average);
    return leave(code);
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(Gpu *g, unsigned *milliwatts) {
    int code = enter_device(__func__, g);
    if (!code) *milliwatts = milli(g->limit);
    return leave(code);
}

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    uint32_t value_type, code;
    union { unsigned number; uint64_t wide; } value;
} FieldValue;

_Static_assert(sizeof(FieldValue) == 40, "a field value of NVML has 40 bytes");

static int read_field(Gpu *g, FieldValue *entry) {
    enum { AVERAGE = 185, INSTANT = 186, SCOPE_GPU = 0, SCOPE_MODULE = 1, UNSIGNED_INT = 1 };
    char name[32];
    snprintf(name, sizeof name, "field:%u", entry->field);
    int code = faulty(name, g);
    if (code) return code;
    if (entry->field != AVERAGE && entry->field != INSTANT) return NOT_SUPPORTED;
    if (entry->scope > SCOPE_MODULE || (entry->scope == SCOPE_MODULE && g->module == 0)) return NOT_SUPPORTED;
    double power = entry->field == AVERAGE ? g->average : g->instant;
    if (entry->scope == SCOPE_GPU) power -= g->module;
    entry->timestamp = (int64_t)(1e6 * now);
    entry->latency = 0;
    entry->value_type = UNSIGNED_INT;
    entry->value.number = milli(g->power_gain * power);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetFieldValues(Gpu *g, int count, FieldValue *values) {
    int code = enter_device(__func__, g);
    for (int i = 0; !code && i < count; i++) values[i].code = (uint32_t)read_field(g, &values[i]);
    return leave(code);
}

EXPORT int nvmlDeviceGetTemperature(Gpu *g, unsigned sensor, unsigned *temperature) {
    int code = enter_device(__func__, g);
    if (!code && sensor != 0) code = INVALID_ARGUMENT;
    if (!code) *temperature = (unsigned)(g->temperature + 0.5);
    return leave(code);
}

EXPORT int nvmlDeviceGetClockInfo(Gpu *g, unsigned type, unsigned *megahertz) {
    enum { GRAPHICS, SM, MEMORY };
    int code = enter_device(__func__, g);
    if (!code && type > MEMORY) code = NOT_SUPPORTED;
    if (!code) *megahertz = (unsigned)(type == MEMORY ? g->memory_clock : g->sm_clock);
    return leave(code);
}

EXPORT int nvmlDeviceGetCurrentClocksEventReasons(Gpu *g, unsigned long long *reasons) {
    int code = enter_device(__func__, g);
    if (!code) *reasons = (unsigned long long)g->throttle;
    return leave(code);
}

EXPORT int nvmlDeviceGetPersistenceMode(Gpu *g, unsigned *mode) {
    int code = enter_device(__func__, g);
    if (!code) *mode = (unsigned)g->persistence;
    return leave(code);
}

EXPORT int nvmlDeviceGetMigMode(Gpu *g, unsigned *current, unsigned *pending) {
    int code = enter_device(__func__, g);
    if (!code) *current = *pending = (unsigned)g->mig;
    return leave(code);
}

typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } Process;

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *g, unsigned *count, Process *processes) {
    int code = enter_device(__func__, g);
    if (code) return leave(code);
    unsigned room = *count;
    *count = g->process_count;
    if (g->process_count > room) return leave(INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < g->process_count; i++)
        processes[i] = (Process){g->processes[i], .memory = 1 << 30, .gpu_instance = ~0u, .compute_instance = ~0u};
    return leave(SUCCESS);
}
