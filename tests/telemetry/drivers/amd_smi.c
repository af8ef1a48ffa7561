/* A simulated libamd_smi.so for the real amdsmi binding; each `device` of the scenario (scenario.h) is one die.
 *
 * Energy and power are the scenario's; one tick of the counter is 2^-16 J, and the library says 15.3 uJ. Further keys:
 *   silent=1               the die whose package's meter is reported by another: 0 ticks, 0 W, no power cap
 *   energy=na|none         the counter is the sentinel; the call is not supported
 *   current=na, average=na what MI200 and MI300 do not have (0xFFFF); wide=1: 0xFFFFFFFF in place of 0xFFFF
 *   name, gfx              market name (_ for a blank), architecture in hexadecimal digits
 *   serial                 16 hexadecimal digits, of which the UUIDs are made; uuid=none: the die does not tell;
 *                          asic=none: it tells by hip_uuid only
 *   hip, node, bus         position in HIP's order (none: an older ROCm), kernel node, PCI bus
 *   edge, hotspot, vram, hbm0..3   degrees Celsius of the sensors there are
 *   gfx_clock, mem_clock, gfx_busy, umc_busy, vram_used, vram_total (MB), ecc_corrected, ecc_uncorrected
 *   ras                    correctable errors of the first block (umc); each further one has one more, and ten and a
 *                          hundred times as many uncorrectable and deferred ones; na: no block tells
 *   vcn, mm                per cent of the decoders' time, on MI300 and before; xgmi_read, xgmi_write: KB on each of two
 *                          links; units: compute units
 *   bits                   indep_throttle_status, as strtoull reads it
 *   ppt, socket, vr, hbm, prochot   share of the firmware's ticks (rate=1000 a second) under each limit, since `from`
 *   pids                   processes and per cents of the compute units: 4711:40,4712:25 */
#define SCENARIO_LIMIT 560
#include "amd_smi_types.h"
#include "scenario.h"

enum { OK = 0, INVALID = 1, NOT_SUPPORTED = 2, NO_PERM = 10, IO = 12, NOT_INIT = 32, DRIVER_NOT_LOADED = 34 };
#define JOULES_PER_TICK (1.0 / 65536)
static int running;
static char dies[SCENARIO_DEVICES]; /* a handle points to its die's place in here */

static int begin(void *handle) { /* what every call about a die does first */
  if (!running) return NOT_INIT;
  int d = (int)((char *)handle - dies);
  scenario_hang(d);
  return scenario_lost(d) ? IO : OK;
}
#define DIE(handle) int d = (int)((char *)(handle) - dies), status_ = begin(handle); (void)d; if (status_) return status_

static int is(int d, const char *key, const char *word) {
  const char *text = scenario_text(d, key);
  return text && !strncmp(text, word, strlen(word)) && strchr(" ,", text[strlen(word)]);
}
static uint64_t figure(int d, const char *key, double otherwise, double scale, uint64_t unknown) {
  double value = scenario_number(d, key, otherwise);
  return isnan(value) ? unknown : (uint64_t)llround(value * scale);
}
static void copy_word(int d, const char *key, const char *otherwise, char *out) {
  const char *text = scenario_text(d, key);
  snprintf(out, 200, "%.*s", text ? (int)strcspn(text, " ") : 200, text ? text : otherwise);
  for (; *out; out++) if (*out == '_') *out = ' ';
}
static void serial_of(int d, char *out) {
  char otherwise[20];
  snprintf(otherwise, sizeof otherwise, "%016x", 0xA0 + d);
  copy_word(d, "serial", otherwise, out);
}

int amdsmi_init(uint64_t flags) {
  (void)flags;
  if (scenario_load()) return DRIVER_NOT_LOADED;
  running = 1;
  return OK;
}
int amdsmi_shut_down(void) { running = 0; return OK; }

int amdsmi_get_socket_handles(uint32_t *count, void **sockets) { /* a socket a die: the binding walks over all */
  if (!running) return NOT_INIT;
  *count = scenario_count;
  for (int d = 0; sockets && d < scenario_count; d++) sockets[d] = &dies[d];
  return OK;
}
int amdsmi_get_processor_handles(void *socket, uint32_t *count, void **handles) {
  *count = 1;
  if (handles) handles[0] = socket;
  return running ? OK : NOT_INIT;
}

int amdsmi_get_energy_count(void *handle, uint64_t *ticks, float *microjoules, uint64_t *nanoseconds) {
  DIE(handle);
  if (is(d, "energy", "none")) return NOT_SUPPORTED;
  double now = scenario_now();
  *ticks = is(d, "energy", "na") ? UINT64_MAX : scenario_number(d, "silent", 0) ? 0 : (uint64_t)(scenario_counter(d, now) / JOULES_PER_TICK);
  *microjoules = 15.3f;
  *nanoseconds = (uint64_t)(scenario_clock() * 1e9);
  return OK;
}
int amdsmi_get_power_info(void *handle, amdsmi_power_info_t *info) {
  DIE(handle);
  double now = scenario_now();
  uint32_t unknown = scenario_number(d, "wide", 0) ? UINT32_MAX : UINT16_MAX;
  int silent = scenario_number(d, "silent", 0) != 0;
  memset(info, 0, sizeof *info);
  info->current_socket_power = is(d, "current", "na") ? unknown : silent ? 0 : (uint32_t)lround(scenario_instant_watts(d, now));
  info->average_socket_power = is(d, "average", "na") ? unknown : silent ? 0 : (uint32_t)lround(scenario_average_watts(d, now));
  return OK;
}
static uint64_t microwatts(double watts) { return isnan(watts) ? UINT64_MAX : (uint64_t)llround(watts * 1e6); }
int amdsmi_get_power_cap_info(void *handle, uint32_t sensor, amdsmi_power_cap_info_t *info) {
  DIE(handle);
  (void)sensor;
  memset(info, 0, sizeof *info);
  if (scenario_number(d, "silent", 0)) return OK;
  info->power_cap = microwatts(scenario_limit(d));
  info->default_power_cap = microwatts(scenario_number(d, "limit_default", SCENARIO_LIMIT));
  info->min_power_cap = microwatts(scenario_number(d, "limit_min", 200));
  info->max_power_cap = microwatts(scenario_number(d, "limit_max", SCENARIO_LIMIT));
  return OK;
}
int amdsmi_set_power_cap(void *handle, uint32_t sensor, uint64_t cap) {
  static const int answers[] = {[LIMIT_SET] = OK, [LIMIT_DENIED] = NO_PERM, [LIMIT_UNSUPPORTED] = NOT_SUPPORTED, [LIMIT_OUTSIDE] = INVALID};
  DIE(handle);
  return sensor ? INVALID : answers[scenario_set_limit(d, cap / 1e6)];
}

int amdsmi_get_gpu_activity(void *handle, amdsmi_engine_usage_t *usage) {
  DIE(handle);
  memset(usage, 0, sizeof *usage);
  usage->gfx_activity = figure(d, "gfx_busy", 75, 1, UINT16_MAX);
  usage->umc_activity = figure(d, "umc_busy", 20, 1, UINT16_MAX);
  return OK;
}
int amdsmi_get_gpu_vram_usage(void *handle, amdsmi_vram_usage_t *usage) {
  DIE(handle);
  memset(usage, 0, sizeof *usage);
  usage->vram_used = figure(d, "vram_used", 1024, 1, UINT32_MAX);
  usage->vram_total = figure(d, "vram_total", 65520, 1, UINT32_MAX);
  return OK;
}
int amdsmi_get_clock_info(void *handle, uint32_t clock, amdsmi_clk_info_t *info) {
  DIE(handle);
  if (clock != 0 && clock != 4) return NOT_SUPPORTED;
  memset(info, 0, sizeof *info);
  info->clk = clock ? figure(d, "mem_clock", 1600, 1, UINT32_MAX) : figure(d, "gfx_clock", 1700, 1, UINT32_MAX);
  return OK;
}
int amdsmi_get_temp_metric(void *handle, uint32_t sensor, uint32_t metric, int64_t *celsius) {
  static const char *keys[] = {"edge", "hotspot", "vram", "hbm0", "hbm1", "hbm2", "hbm3"};
  DIE(handle);
  if (sensor >= sizeof keys / sizeof *keys || metric != 0 || !scenario_text(d, keys[sensor])) return NOT_SUPPORTED;
  *celsius = (int64_t)figure(d, keys[sensor], 0, 1, UINT16_MAX);
  return OK;
}
int amdsmi_get_gpu_total_ecc_count(void *handle, amdsmi_error_count_t *count) {
  DIE(handle);
  memset(count, 0, sizeof *count);
  count->correctable_count = figure(d, "ecc_corrected", 0, 1, UINT64_MAX);
  count->uncorrectable_count = figure(d, "ecc_uncorrected", 0, 1, UINT64_MAX);
  return OK;
}
int amdsmi_get_gpu_ecc_count(void *handle, uint64_t block, amdsmi_error_count_t *count) {
  DIE(handle);
  double first = scenario_number(d, "ras", NAN);
  if (isnan(first)) return NOT_SUPPORTED;
  memset(count, 0, sizeof *count);
  count->correctable_count = (uint64_t)(first + __builtin_ctzll(block));
  count->uncorrectable_count = 10 * count->correctable_count;
  count->deferred_count = 100 * count->correctable_count;
  return OK;
}

static uint64_t residency(int d, const char *key, double ticks, double rate) {
  double share = scenario_number(d, key, 0), since = scenario_number(d, "from", 0) * rate;
  return isnan(share) ? UINT64_MAX : (uint64_t)(share * fmax(0, ticks - since));
}
int amdsmi_get_gpu_metrics_info(void *handle, amdsmi_gpu_metrics_t *metrics) {
  DIE(handle);
  memset(metrics, 0xFF, sizeof *metrics);
  const char *bits = scenario_text(d, "bits");
  if (bits) metrics->indep_throttle_status = strtoull(bits, NULL, 0);
  if (scenario_text(d, "vcn")) metrics->vcn_activity[0] = metrics->vcn_activity[1] = (uint16_t)scenario_number(d, "vcn", 0);
  if (scenario_text(d, "mm")) metrics->average_mm_activity = (uint16_t)scenario_number(d, "mm", 0);
  for (int link = 0; link < 2 && scenario_text(d, "xgmi_read"); link++) {
    metrics->xgmi_read_data_acc[link] = (uint64_t)scenario_number(d, "xgmi_read", 0);
    metrics->xgmi_write_data_acc[link] = (uint64_t)scenario_number(d, "xgmi_write", 0);
  }
  double rate = scenario_number(d, "rate", 0), ticks = floor(scenario_now() * rate);
  if (rate > 0) {
    metrics->accumulation_counter = (uint64_t)ticks;
    metrics->ppt_residency_acc = residency(d, "ppt", ticks, rate);
    metrics->socket_thm_residency_acc = residency(d, "socket", ticks, rate);
    metrics->vr_thm_residency_acc = residency(d, "vr", ticks, rate);
    metrics->hbm_thm_residency_acc = residency(d, "hbm", ticks, rate);
    metrics->prochot_residency_acc = residency(d, "prochot", ticks, rate);
  }
  return OK;
}
int amdsmi_get_gpu_process_list(void *handle, uint32_t *count, amdsmi_proc_info_t *list) {
  DIE(handle);
  uint32_t room = *count, found = 0;
  const char *text = scenario_text(d, "pids");
  while (text && *text > ' ' && found < room) {
    const char *share = strchr(text, ':') + 1;
    memset(&list[found], 0, sizeof *list);
    list[found].pid = (uint32_t)atoi(text);
    list[found++].cu_occupancy = !strncmp(share, "na", 2) ? UINT32_MAX : (uint32_t)atoi(share);
    text = share + strcspn(share, ", ");
    if (*text == ',') text++;
  }
  *count = found;
  return OK;
}

int amdsmi_get_gpu_device_uuid(void *handle, uint32_t *length, char *uuid) {
  char serial[256];
  DIE(handle);
  if (is(d, "uuid", "none")) return NOT_SUPPORTED;
  serial_of(d, serial);
  snprintf(uuid, *length, "%.2sff740c-0000-1000-80%.2s-%.12s", serial, serial + 2, serial + 4);
  return OK;
}
int amdsmi_get_gpu_device_bdf(void *handle, uint64_t *bdf) { /* domain 48 bits, bus 8, device 5, function 3 */
  DIE(handle);
  *bdf = figure(d, "bus", 0xC1 + d, 256, 0);
  return OK;
}
int amdsmi_get_gpu_enumeration_info(void *handle, amdsmi_enumeration_info_t *info) {
  char serial[256];
  DIE(handle);
  if (is(d, "hip", "none")) return NOT_SUPPORTED;
  memset(info, 0, sizeof *info);
  info->hip_id = (uint32_t)figure(d, "hip", d, 1, UINT32_MAX);
  serial_of(d, serial);
  snprintf(info->hip_uuid, sizeof info->hip_uuid, "GPU-%.200s", serial);
  return OK;
}
int amdsmi_get_gpu_kfd_info(void *handle, amdsmi_kfd_info_t *info) {
  DIE(handle);
  memset(info, 0, sizeof *info);
  info->node_id = (uint32_t)figure(d, "node", d + 4, 1, UINT32_MAX);
  return OK;
}
int amdsmi_get_gpu_asic_info(void *handle, amdsmi_asic_info_t *info) {
  char gfx[256];
  DIE(handle);
  memset(info, 0, sizeof *info);
  copy_word(d, "name", "AMD_Instinct_MI250X", info->market_name);
  copy_word(d, "gfx", "90a", gfx);
  info->num_of_compute_units = (uint32_t)scenario_number(d, "units", UINT32_MAX);
  info->target_graphics_version = strtoull(gfx, NULL, 16);
  if (!is(d, "asic", "none")) serial_of(d, info->asic_serial);
  return OK;
}
int amdsmi_get_gpu_board_info(void *handle, amdsmi_board_info_t *info) {
  DIE(handle);
  memset(info, 0, sizeof *info);
  copy_word(d, "board", "692231000123", info->product_serial);
  return OK;
}
int amdsmi_get_gpu_driver_info(void *handle, amdsmi_driver_info_t *info) {
  DIE(handle);
  memset(info, 0, sizeof *info);
  strcpy(info->driver_version, "6.12.12");
  return OK;
}
int amdsmi_get_gpu_vbios_info(void *handle, amdsmi_vbios_info_t *info) {
  DIE(handle);
  memset(info, 0, sizeof *info);
  strcpy(info->version, "022.040.003.043");
  return OK;
}
