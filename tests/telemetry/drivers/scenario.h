/* What a simulated driver plays: a file named by WATTIER_SCENARIO, read anew at every init of the library.
 *
 * One device a line, `device key=value ...`; `#` begins a comment; a line `all key=value ...` sets defaults for the
 * devices after it. Times are seconds after `start`, a reading of CLOCK_MONOTONIC (a line `start SECONDS`; without it,
 * the moment of init). Values are numbers, or the word `na` for what the device does not have.
 *
 *   low, high, hz    power is `high` watts in the first half of each period of 1/hz s, `low` in the second (hz=0: high)
 *   offset           energy on the counter at the start, J
 *   refresh          the counter stands still for so many seconds (default 0.1)
 *   power_refresh    the instantaneous power is sampled so often, s (default 0.02)
 *   average          the averaged power is a mean over so many seconds (default 1)
 *   gain             the counter shows the true energy times this (default 1)
 *   reset            the counter starts again at 0 at this time
 *   backward, by     the counter falls by `by` joules at this time
 *   stuck            the counter stands still from this time on
 *   lost             the device has fallen off the bus at this time
 *   hang, hang_for   a call that begins within `hang_for` seconds after this time blocks until they are over
 *   limit_min, limit_default, limit_max, limit   power limits in W: the range, what it is by itself, and what it is at first
 *   setting          what comes of setting it: denied, none (not supported), lies (says yes, and nothing changes),
 *                    sticks (the same, but only where it would rise)
 * A limit that was set outlives the process, as a driver's does: each call adds a record to the file that
 * WATTIER_LIMITS names (without it, none can be set), and power is held below it from then on.
 *
 * Any other key belongs to the vendor's file: scenario_number(device, "temperature", 55). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SCENARIO_DEVICES 16
#define SCENARIO_LINE 2000
#define SCENARIO_SETS 1000
#ifndef SCENARIO_LIMIT
#define SCENARIO_LIMIT 700
#endif
typedef struct { char text[2 * SCENARIO_LINE]; } ScenarioDevice;
static ScenarioDevice scenario_devices[SCENARIO_DEVICES];
static int scenario_count;
static double scenario_start;

static double scenario_clock(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }

static int scenario_load(void) {
  const char *path = getenv("WATTIER_SCENARIO");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return -1;
  char line[SCENARIO_LINE], defaults[SCENARIO_LINE] = "";
  scenario_count = 0;
  scenario_start = scenario_clock();
  while (fgets(line, sizeof line, file)) {
    line[strcspn(line, "#\n")] = 0;
    if (!strncmp(line, "start ", 6)) scenario_start = atof(line + 6);
    else if (!strncmp(line, "all", 3)) strcpy(defaults, line + 3);
    else if (!strncmp(line, "device", 6) && scenario_count < SCENARIO_DEVICES) /* the first match wins: its own, then the defaults */
      snprintf(scenario_devices[scenario_count++].text, sizeof scenario_devices[0].text, "%s %s ", line + 6, defaults);
  }
  fclose(file);
  return 0;
}

static const char *scenario_text(int device, const char *key) { /* points behind `key=`, or NULL */
  char wanted[64];
  snprintf(wanted, sizeof wanted, " %s=", key);
  const char *found = strstr(scenario_devices[device].text, wanted);
  return found ? found + strlen(wanted) : NULL;
}

static double scenario_number(int device, const char *key, double otherwise) { /* NaN for `na` */
  const char *text = scenario_text(device, key);
  return !text ? otherwise : !strncmp(text, "na", 2) ? NAN : atof(text);
}

static double scenario_now(void) { return scenario_clock() - scenario_start; }

typedef struct { double clock, watts; int device, pid; } ScenarioLimit; /* since CLOCK_MONOTONIC's reading */
enum { LIMIT_SET = 0, LIMIT_DENIED, LIMIT_UNSUPPORTED, LIMIT_OUTSIDE };

static int scenario_limits(int d, ScenarioLimit *found, int room) { /* the device's, oldest first */
  const char *path = getenv("WATTIER_LIMITS");
  FILE *file = path ? fopen(path, "rb") : NULL;
  int count = 0;
  while (file && count < room && fread(&found[count], sizeof *found, 1, file)) if (found[count].device == d) count++;
  if (file) fclose(file);
  return count;
}

static double scenario_limit(int d) { /* in force now, W; NaN for `na` */
  ScenarioLimit all[SCENARIO_SETS];
  int count = scenario_limits(d, all, SCENARIO_SETS);
  return count ? all[count - 1].watts : scenario_number(d, "limit", SCENARIO_LIMIT);
}

static int scenario_set_limit(int d, double watts) {
  const char *path = getenv("WATTIER_LIMITS"), *setting = scenario_text(d, "setting");
  if (!setting) setting = "";
  if (!path || !strncmp(setting, "none", 4)) return LIMIT_UNSUPPORTED;
  if (!strncmp(setting, "denied", 6)) return LIMIT_DENIED;
  if (watts < scenario_number(d, "limit_min", 200) || watts > scenario_number(d, "limit_max", SCENARIO_LIMIT)) return LIMIT_OUTSIDE;
  if (!strncmp(setting, "lies", 4) || (!strncmp(setting, "sticks", 6) && watts > scenario_limit(d))) return LIMIT_SET;
  ScenarioLimit made = {scenario_clock(), watts, d, (int)getpid()};
  FILE *file = fopen(path, "ab");
  int written = file && fwrite(&made, sizeof made, 1, file) == 1;
  return file && !fclose(file) && written ? LIMIT_SET : LIMIT_UNSUPPORTED;
}

static double scenario_watts(int d, double t) {
  double high = scenario_number(d, "high", 300), hz = scenario_number(d, "hz", 0), limit = INFINITY;
  ScenarioLimit all[SCENARIO_SETS];
  int count = scenario_limits(d, all, SCENARIO_SETS);
  for (int i = 0; i < count && all[i].clock - scenario_start <= t; i++) limit = all[i].watts;
  if (hz <= 0) return fmin(high, limit);
  double phase = t * hz - floor(t * hz);
  return fmin(limit, phase < 0.5 ? high : scenario_number(d, "low", high));
}

static double scenario_joules_below(int d, double t, double limit) { /* the energy since the start under one limit */
  double high = fmin(limit, scenario_number(d, "high", 300)), hz = scenario_number(d, "hz", 0);
  if (hz <= 0) return high * t;
  double low = fmin(limit, scenario_number(d, "low", high)), whole = floor(t * hz), phase = t * hz - whole;
  return (whole * (high + low) / 2 + (phase < 0.5 ? phase * high : 0.5 * high + (phase - 0.5) * low)) / hz;
}

static double scenario_joules(int d, double t) { /* the true energy since the start */
  ScenarioLimit all[SCENARIO_SETS];
  int count = scenario_limits(d, all, SCENARIO_SETS);
  double joules = scenario_joules_below(d, count ? fmin(t, all[0].clock - scenario_start) : t, INFINITY);
  for (int i = 0; i < count; i++) {
    double from = all[i].clock - scenario_start, to = i + 1 < count ? fmin(t, all[i + 1].clock - scenario_start) : t;
    if (to > from) joules += scenario_joules_below(d, to, all[i].watts) - scenario_joules_below(d, from, all[i].watts);
  }
  return joules;
}

static double scenario_grid(double t, double period) { return period > 0 ? floor(t / period) * period : t; }

static double scenario_instant_watts(int d, double t) {
  return scenario_watts(d, scenario_grid(t, scenario_number(d, "power_refresh", 0.02)));
}

static double scenario_counter(int d, double t) { /* J, as the counter shows it */
  double seen = scenario_grid(t, scenario_number(d, "refresh", 0.1)), gain = scenario_number(d, "gain", 1), base = scenario_number(d, "offset", 1000);
  double reset = scenario_number(d, "reset", INFINITY), backward = scenario_number(d, "backward", INFINITY);
  seen = fmin(seen, scenario_number(d, "stuck", INFINITY));
  if (seen >= reset) return (scenario_joules(d, seen) - scenario_joules(d, reset)) * gain;
  return base + scenario_joules(d, seen) * gain - (seen >= backward ? scenario_number(d, "by", 0) : 0);
}

static double scenario_average_watts(int d, double t) {
  double seconds = scenario_number(d, "average", 1);
  return (scenario_joules(d, t) - scenario_joules(d, t - seconds)) / seconds;
}

static int scenario_lost(int d) { return scenario_now() >= scenario_number(d, "lost", INFINITY); }

static void scenario_hang(int d) {
  double begin = scenario_number(d, "hang", INFINITY), end = begin + scenario_number(d, "hang_for", 0), now = scenario_now();
  if (now < begin || now >= end) return;
  struct timespec rest = {(time_t)(end - now), (long)(fmod(end - now, 1) * 1e9)};
  nanosleep(&rest, NULL);
}
