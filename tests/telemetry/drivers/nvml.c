/* A simulated libnvidia-ml.so.1 for the real pynvml binding; scenario.h says how to write its scenario.
 *
 * Keys of its own (numbers; `na` = the device does not have it):
 *   uuid, name, arch        GPU-aaaa-0000 and so on; Simulated_H200 (`_` is shown as a blank); 9 = Hopper
 *   temperature, memory_temperature, sm_mhz, mem_mhz, busy, memory_busy (0 to 1), memory_used_mb, memory_total_mb
 *   ecc_corrected, ecc_uncorrected
 *   reasons                 mask of clock-event reasons, decimal, in force from throttle_from to throttle_to
 *   board_limit=1           the board's limit acts then, too: a reason that has seconds and no bit
 *   throttled_before        seconds already on each reason's counter; na = it counts none
 *   moved_fields            where the three counters that moved are: 269 (default) or 251, power smoothing at the other
 *   pidN, busyN, oddN       processes 1 to 8: share in every sample, and in every second one if that differs
 *   goneN                   when process N ended (scenario time): it is in no later sample
 *   garbage=1               samples of no process, and busier than can be, among the others
 *   counter, counter_field, power, instant, mask, memory_v2, processes = na   takes that call or field away
 *   bare=1                  the device knows its averaged power and nothing else
 *   mig=1                   split by MIG
 *   unlisted=1              no handle can be had once it is lost */
#define _GNU_SOURCE
#include "scenario.h"
#include <stddef.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, NOT_LOADED = 9, NO_FUNCTION = 13, LOST = 15 };
enum { UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3 };
typedef unsigned long long Wide;
typedef struct { int index; } Gpu;
typedef struct { unsigned id, scope; long long stamp, latency; int type, status; union { double d; unsigned u; Wide w; } value; } Field;
typedef struct { unsigned gpu, memory; } Rates;
typedef struct { Wide total, free, used; } Memory;
typedef struct { unsigned version; Wide total, reserved, free, used; } Memory2;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct { unsigned pid; Wide stamp; unsigned sm, memory, encoder, decoder; } Process;

/* For the test that compares with the binding's own structures: offsets in the order of the fields, then the size. */
#define AT(type, field) offsetof(type, field)
const size_t layout_field[] = {AT(Field, id), AT(Field, scope), AT(Field, stamp), AT(Field, latency), AT(Field, type), AT(Field, status), AT(Field, value), sizeof(Field)};
const size_t layout_rates[] = {AT(Rates, gpu), AT(Rates, memory), sizeof(Rates)};
const size_t layout_memory[] = {AT(Memory, total), AT(Memory, free), AT(Memory, used), sizeof(Memory)};
const size_t layout_memory2[] = {AT(Memory2, version), AT(Memory2, total), AT(Memory2, reserved), AT(Memory2, free), AT(Memory2, used), sizeof(Memory2)};
const size_t layout_pci[] = {AT(Pci, legacy), AT(Pci, domain), AT(Pci, bus), AT(Pci, device), AT(Pci, id), AT(Pci, subsystem), AT(Pci, bus_id), sizeof(Pci)};
const size_t layout_process[] = {AT(Process, pid), AT(Process, stamp), AT(Process, sm), AT(Process, memory), AT(Process, encoder), AT(Process, decoder), sizeof(Process)};

static Gpu gpus[SCENARIO_DEVICES];

static int is_set(Gpu *g, const char *key) { return scenario_number(g->index, key, 0) > 0; }
static int is_na(Gpu *g, const char *key) { return isnan(scenario_number(g->index, key, 0)); }
static int status_of(Gpu *g, const char *key) { /* of a call that waits for the device */
  scenario_hang(g->index);
  return scenario_lost(g->index) ? LOST : is_set(g, "bare") || is_na(g, key) ? NOT_SUPPORTED : OK;
}
#define NEED(g, key) do { int status_ = status_of(g, key); if (status_) return status_; } while (0)

static int number_of(Gpu *g, const char *key, double otherwise, double scale, unsigned *value) {
  NEED(g, key);
  *value = (unsigned)(scenario_number(g->index, key, otherwise) * scale + 0.5);
  return OK;
}

static void word_of(Gpu *g, const char *key, const char *otherwise, char *out, unsigned size) {
  const char *text = scenario_text(g->index, key);
  if (!text) text = otherwise;
  snprintf(out, size, "%.*s", (int)strcspn(text, " "), text);
  for (char *c = out; *c; c++) if (*c == '_') *c = ' ';
}

static double throttled_seconds(Gpu *g) {
  double from = scenario_number(g->index, "throttle_from", 0), to = scenario_number(g->index, "throttle_to", INFINITY);
  return fmax(0, fmin(scenario_now(), to) - from);
}
static int throttles_now(Gpu *g) {
  double now = scenario_now();
  return now >= scenario_number(g->index, "throttle_from", 0) && now < scenario_number(g->index, "throttle_to", INFINITY);
}

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  for (int i = 0; i < SCENARIO_DEVICES; i++) gpus[i].index = i;
  return scenario_load() ? NOT_LOADED : OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int s) { return s == LOST ? "GPU is lost" : s == NOT_SUPPORTED ? "Not Supported" : s == NOT_LOADED ? "Driver Not Loaded" : "simulated"; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { snprintf(s, n, "580.65.06"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = (unsigned)scenario_count; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Gpu **g) {
  if (i >= (unsigned)scenario_count) return INVALID;
  *g = &gpus[i];
  return scenario_lost((int)i) && is_set(*g, "unlisted") ? LOST : OK;
}
int nvmlDeviceGetUUID(Gpu *g, char *s, unsigned n) { /* the driver remembers it also of a lost device */
  char c = (char)('a' + g->index), otherwise[32];
  snprintf(otherwise, sizeof otherwise, "GPU-%c%c%c%c-0000", c, c, c, c);
  word_of(g, "uuid", otherwise, s, n);
  return OK;
}
int nvmlDeviceGetName(Gpu *g, char *s, unsigned n) { if (scenario_lost(g->index)) return LOST; word_of(g, "name", "Simulated_H200", s, n); return OK; }
int nvmlDeviceGetSerial(Gpu *g, char *s, unsigned n) { NEED(g, "serial"); snprintf(s, n, "16505230%02d", g->index); return OK; }
int nvmlDeviceGetVbiosVersion(Gpu *g, char *s, unsigned n) { NEED(g, "vbios"); snprintf(s, n, "96.00.99.00.%02X", g->index); return OK; }
int nvmlDeviceGetPciInfo_v3(Gpu *g, Pci *p) {
  NEED(g, "pci");
  *p = (Pci){.bus = 0x18u + (unsigned)g->index};
  snprintf(p->legacy, sizeof p->legacy, "0000:%02X:00.0", p->bus);
  snprintf(p->bus_id, sizeof p->bus_id, "00000000:%02X:00.0", p->bus);
  return OK;
}
int nvmlDeviceGetArchitecture(Gpu *g, unsigned *a) { return number_of(g, "arch", 9, 1, a); }
int nvmlDeviceGetMigMode(Gpu *g, unsigned *current, unsigned *pending) { NEED(g, "mig"); *current = *pending = (unsigned)is_set(g, "mig"); return OK; }

static Wide millijoules(Gpu *g) { return (Wide)floor(scenario_counter(g->index, scenario_now()) * 1e3); }
int nvmlDeviceGetTotalEnergyConsumption(Gpu *g, Wide *mj) { NEED(g, "counter"); *mj = millijoules(g); return OK; }
int nvmlDeviceGetPowerUsage(Gpu *g, unsigned *mw) {
  scenario_hang(g->index);
  if (scenario_lost(g->index)) return LOST;
  if (is_na(g, "power")) return NOT_SUPPORTED;
  *mw = (unsigned)(scenario_average_watts(g->index, scenario_now()) * 1e3 + 0.5);
  return OK;
}

static int is_counting(Gpu *g, unsigned id) { /* 1 = this reason's seconds grow while the device throttles, -1 = no such field */
  unsigned moved = (unsigned)scenario_number(g->index, "moved_fields", 269), bits = (unsigned)scenario_number(g->index, "reasons", 0);
  if (is_na(g, "throttled_before")) return -1;
  return id == 74 ? !!(bits & 0x4) : id == 75 || id == moved ? !!(bits & 0x20) : id == 76 ? !!(bits & 0x10) : id == 77 ? is_set(g, "board_limit")
       : id == moved + 1 ? !!(bits & 0x40) : id == moved + 2 ? !!(bits & 0x80) : -1;
}
static int narrow(Field *f, double value) { f->type = UNSIGNED_INT; f->value.w = ~0ULL; f->value.u = (unsigned)value; return OK; } /* the other half is rubbish */
static int wide(Field *f, double value) { f->type = UNSIGNED_LONG_LONG; f->value.w = (Wide)value; return OK; }
static int field(Gpu *g, Field *f) {
  unsigned moved = (unsigned)scenario_number(g->index, "moved_fields", 269), smoothing = moved == 269 ? 251 : 269;
  int counting = is_counting(g, f->id);
  if (is_set(g, "bare")) return NOT_SUPPORTED;
  if (counting >= 0) return wide(f, (scenario_number(g->index, "throttled_before", 0) + counting * throttled_seconds(g)) * 1e9);
  if (f->id >= smoothing && f->id <= smoothing + 2) return narrow(f, 1);
  if (f->id == 82) return is_na(g, "memory_temperature") ? NOT_SUPPORTED : narrow(f, scenario_number(g->index, "memory_temperature", 70));
  if (f->id == 83) return is_na(g, "counter") || is_na(g, "counter_field") ? NOT_SUPPORTED : wide(f, (double)millijoules(g));
  if (f->id == 186 && f->scope == 0) return is_na(g, "instant") ? NOT_SUPPORTED : narrow(f, scenario_instant_watts(g->index, scenario_now()) * 1e3 + 0.5);
  return NOT_SUPPORTED;
}
int nvmlDeviceGetFieldValues(Gpu *g, int n, Field *f) {
  scenario_hang(g->index);
  if (scenario_lost(g->index)) return LOST;
  for (int i = 0; i < n; i++) f[i].status = field(g, &f[i]);
  return OK;
}

int nvmlDeviceGetUtilizationRates(Gpu *g, Rates *r) {
  int status = number_of(g, "busy", 1, 100, &r->gpu);
  return status ? status : number_of(g, "memory_busy", 0.5, 100, &r->memory);
}
int nvmlDeviceGetMemoryInfo(Gpu *g, Memory *m) { /* the first version counts what the driver reserves as used */
  NEED(g, "memory_used_mb");
  Wide used = (Wide)scenario_number(g->index, "memory_used_mb", 10240) << 20, total = (Wide)scenario_number(g->index, "memory_total_mb", 143771) << 20;
  *m = (Memory){total, total - used - (600 << 20), used + (600 << 20)};
  return OK;
}
int nvmlDeviceGetMemoryInfo_v2(Gpu *g, Memory2 *m) {
  if (is_na(g, "memory_v2")) return NO_FUNCTION;
  Memory old;
  int status = nvmlDeviceGetMemoryInfo(g, &old);
  if (status || m->version != (sizeof(Memory2) | 2u << 24)) return status ? status : INVALID;
  *m = (Memory2){m->version, old.total, 600 << 20, old.free, old.used - (600 << 20)};
  return OK;
}
int nvmlDeviceGetTemperature(Gpu *g, int sensor, unsigned *t) { return sensor ? INVALID : number_of(g, "temperature", 55, 1, t); }
int nvmlDeviceGetClockInfo(Gpu *g, int kind, unsigned *mhz) { /* 1 = SM, 2 = memory */
  return kind == 1 ? number_of(g, "sm_mhz", 1980, 1, mhz) : kind == 2 ? number_of(g, "mem_mhz", 3201, 1, mhz) : INVALID;
}
int nvmlDeviceGetPowerManagementLimit(Gpu *g, unsigned *mw) { NEED(g, "limit"); *mw = (unsigned)(scenario_limit(g->index) * 1e3 + 0.5); return OK; }
int nvmlDeviceGetEnforcedPowerLimit(Gpu *g, unsigned *mw) { return nvmlDeviceGetPowerManagementLimit(g, mw); }
int nvmlDeviceGetPowerManagementDefaultLimit(Gpu *g, unsigned *mw) { return number_of(g, "limit_default", SCENARIO_LIMIT, 1e3, mw); }
int nvmlDeviceGetPowerManagementLimitConstraints(Gpu *g, unsigned *low, unsigned *high) {
  int status = number_of(g, "limit_min", 200, 1e3, low);
  return status ? status : number_of(g, "limit_max", SCENARIO_LIMIT, 1e3, high);
}
int nvmlDeviceSetPowerManagementLimit(Gpu *g, unsigned mw) {
  static const int answers[] = {[LIMIT_SET] = OK, [LIMIT_DENIED] = NO_PERMISSION, [LIMIT_UNSUPPORTED] = NOT_SUPPORTED, [LIMIT_OUTSIDE] = INVALID};
  NEED(g, "limit");
  return answers[scenario_set_limit(g->index, mw / 1e3)];
}
int nvmlDeviceGetTotalEccErrors(Gpu *g, int kind, int since, Wide *count) { /* kind 0 = corrected; since 0 = since the driver loaded */
  const char *key = kind ? "ecc_uncorrected" : "ecc_corrected";
  NEED(g, key);
  *count = since ? 999999 : (Wide)scenario_number(g->index, key, 0);
  return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(Gpu *g, Wide *mask) {
  NEED(g, "reasons");
  *mask = throttles_now(g) ? (Wide)scenario_number(g->index, "reasons", 0) : 0;
  return OK;
}
int nvmlDeviceGetCurrentClocksEventReasons(Gpu *g, Wide *mask) { return is_na(g, "mask") ? NO_FUNCTION : nvmlDeviceGetCurrentClocksThrottleReasons(g, mask); }

static int busy_processes(Gpu *g, Process *out, Wide newer_than) { /* a sample each 0.2 s, the last 15 of which are kept */
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  long long tick = (t.tv_sec * 1000000LL + t.tv_nsec / 1000) / 200000;
  double now = scenario_now();
  int count = 0;
  for (int back = 14; back >= 0; back--) {
    Wide stamp = (Wide)(tick - back) * 200000;
    if (stamp <= newer_than) continue;
    for (int i = 1; i <= 8; i++) {
      char pid[8], busy[8], odd[8], gone[8];
      snprintf(pid, sizeof pid, "pid%d", i); snprintf(busy, sizeof busy, "busy%d", i);
      snprintf(odd, sizeof odd, "odd%d", i); snprintf(gone, sizeof gone, "gone%d", i);
      if (!scenario_text(g->index, pid) || now - back * 0.2 > scenario_number(g->index, gone, INFINITY)) continue;
      double share = scenario_number(g->index, busy, 0);
      if ((tick - back) % 2) share = scenario_number(g->index, odd, share);
      out[count++] = (Process){(unsigned)scenario_number(g->index, pid, 0), stamp, (unsigned)(share * 100 + 0.5), 10, 0, 0};
    }
    if (is_set(g, "garbage")) { out[count++] = (Process){0, stamp, 50, 0, 0, 0}; out[count++] = (Process){77, stamp + 7, 4000000000u, 0, 0, 0}; }
  }
  return count;
}
int nvmlDeviceGetProcessUtilization(Gpu *g, Process *out, unsigned *count, Wide newer_than) {
  NEED(g, "processes");
  Process all[15 * 10];
  unsigned found = (unsigned)busy_processes(g, all, newer_than), room = *count;
  *count = found;
  if (!found) return NOT_FOUND;
  if (!out || room < found) return INSUFFICIENT_SIZE;
  memcpy(out, all, found * sizeof *all);
  return OK;
}
