/* A simulated libnvidia-ml.so.1: two GPUs at constant watts, for the real pynvml binding.
 *
 * The environment sets the scene, read at every call: FAKE_NVML_WATTS (default 300), FAKE_NVML_MIG=1,
 * FAKE_NVML_BARE=1 (the device supports power usage and nothing else), FAKE_NVML_LOST=1 (GPU 1 fell off the bus). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, LOST = 15 };
typedef struct { int index; } Gpu;
static Gpu gpus[2] = {{0}, {1}};
typedef struct { unsigned id, scope; long long stamp, latency; int type, status; union { double d; unsigned u; unsigned long long ull; } value; } Field;
typedef struct { unsigned gpu, memory; } Rates;
typedef struct { unsigned long long total, free, used; } Memory;

static int flag(const char *name) { const char *v = getenv(name); return v && v[0] == '1'; }
static double watts(void) { const char *v = getenv("FAKE_NVML_WATTS"); return v ? atof(v) : 300.0; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static int rich(Gpu *g) { if (flag("FAKE_NVML_LOST") && g->index == 1) return LOST; return flag("FAKE_NVML_BARE") ? NOT_SUPPORTED : OK; }
#define RICH(g) do { int status_ = rich(g); if (status_) return status_; } while (0)

int nvmlInitWithFlags(unsigned f) { (void)f; return OK; }
int nvmlInit_v2(void) { return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int s) { return s == LOST ? "GPU is lost" : s == NOT_SUPPORTED ? "Not Supported" : "simulated"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Gpu **g) { if (i > 1) return INVALID; *g = &gpus[i]; return OK; }
int nvmlDeviceGetUUID(Gpu *g, char *s, unsigned n) { snprintf(s, n, "GPU-%s-0000", g->index ? "bbbb" : "aaaa"); return OK; }
int nvmlDeviceGetName(Gpu *g, char *s, unsigned n) { (void)g; snprintf(s, n, "Simulated H200"); return OK; }
int nvmlDeviceGetMigMode(Gpu *g, unsigned *c, unsigned *p) { (void)g; *c = *p = flag("FAKE_NVML_MIG"); return OK; }
int nvmlDeviceGetTotalEnergyConsumption(Gpu *g, unsigned long long *mj) { RICH(g); *mj = (unsigned long long)(now() * watts() * 1000); return OK; }
int nvmlDeviceGetPowerUsage(Gpu *g, unsigned *mw) { int s = rich(g); if (s == LOST) return s; *mw = (unsigned)(watts() * 1000) + 7000; return OK; }
int nvmlDeviceGetFieldValues(Gpu *g, int n, Field *f) {
  if (rich(g) == LOST) return LOST;
  for (int i = 0; i < n; i++) {
    f[i].status = rich(g) || f[i].id != 186 ? NOT_SUPPORTED : OK;
    f[i].type = 1;
    f[i].value.u = (unsigned)(watts() * 1000);
  }
  return OK;
}
int nvmlDeviceGetUtilizationRates(Gpu *g, Rates *r) { RICH(g); r->gpu = 75; r->memory = 20; return OK; }
int nvmlDeviceGetMemoryInfo(Gpu *g, Memory *m) { RICH(g); m->total = 150ULL << 30; m->used = 10ULL << 30; m->free = 140ULL << 30; return OK; }
int nvmlDeviceGetTemperature(Gpu *g, int sensor, unsigned *t) { RICH(g); (void)sensor; *t = 61; return OK; }
int nvmlDeviceGetClockInfo(Gpu *g, int kind, unsigned *mhz) { RICH(g); *mhz = kind == 1 ? 1980 : 3201; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(Gpu *g, unsigned long long *m) { RICH(g); *m = 0x1 | 0x4 | 0x20; return OK; }
