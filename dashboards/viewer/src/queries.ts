// From a dashboard's variables and targets to Grafana's data frames, over Prometheus' HTTP API.
import { DataFrame, FieldType, MutableDataFrame, rangeUtil, toDataFrame } from "@grafana/data";

export interface Settings {
  from: number; // seconds since 1970
  to: number;
  scrapeSeconds: number; // the datasource's "scrape interval"
  variables: Record<string, string[]>; // given on the command line
}
export type Values = Record<string, { values: string[]; all: boolean; allValue?: string }>;

async function ask(path: string, parameters: Record<string, string | number>): Promise<any> {
  const query = new URLSearchParams(Object.entries(parameters).map(([k, v]) => [k, String(v)]));
  const answer = await (await fetch(`/api/v1/${path}?${query}`)).json();
  if (answer.status !== "success") throw new Error(`${answer.errorType}: ${answer.error}`);
  return answer.data;
}

const regexEscape = (text: string) => text.replace(/[\\^$*+?.()|[\]{}/-]/g, "\\\\$&");

/** Text with variables put in, as the Prometheus datasource formats them; unknown ones are left alone. */
export function substitute(text: string, values: Values, fixed: Record<string, string> = {}): string {
  return text.replace(/\$(\w+)|\$\{(\w+)(?::(\w+))?\}|\[\[(\w+)\]\]/g, (whole, a, b, format, c) => {
    const name = a ?? b ?? c;
    if (name in fixed) return fixed[name];
    const known = values[name];
    if (!known) return whole;
    if (known.all && known.allValue) return known.allValue;
    const list = known.values;
    if (format === "raw" || format === "csv" || format === "text") return list.join(",");
    return list.length === 1 && !known.all ? (format === "regex" ? regexEscape(list[0]) : list[0]) : `(${list.map(regexEscape).join("|")})`;
  });
}

/** The choices of all variables, each resolved with those before it. */
export async function resolveVariables(dashboard: any, settings: Settings): Promise<Values> {
  const values: Values = {};
  for (const variable of dashboard.templating?.list ?? []) {
    const given = settings.variables[variable.name];
    if (variable.type === "datasource") {
      values[variable.name] = { values: ["prometheus"], all: false };
      continue;
    }
    const options = variable.type === "query" ? await choices(variable, values, settings) : fixedChoices(variable);
    const current = [variable.current?.value ?? []].flat().filter((value: string) => value !== "" && value !== undefined);
    const all = !given && Boolean(variable.includeAll) && (current.length === 0 || current.includes("$__all"));
    const chosen = given ?? (all ? options : current.length ? current : options.slice(0, 1));
    values[variable.name] = { values: chosen, all, allValue: variable.allValue || undefined };
  }
  return values;
}

const fixedChoices = (variable: any): string[] => {
  const text = typeof variable.query === "string" ? variable.query : "";
  return variable.type === "custom" ? text.split(",").map((part: string) => part.trim()) : [text];
};

async function choices(variable: any, values: Values, settings: Settings): Promise<string[]> {
  const text = substitute(typeof variable.query === "string" ? variable.query : variable.query.query, values);
  const labelled = /^label_values\((?:(.+),\s*)?(\w+)\)$/.exec(text.trim());
  if (!labelled) throw new Error(`variable ${variable.name}: ${text} is not understood`);
  const [, match, label] = labelled;
  const range = { start: settings.from, end: settings.to };
  const found: string[] = await ask(`label/${label}/values`, match ? { ...range, "match[]": match } : range);
  const wanted = variable.regex ? new RegExp(variable.regex.replace(/^\/|\/$/g, "")) : undefined;
  const left = wanted ? found.filter((value) => wanted.test(value)) : found;
  return variable.sort === 2 ? left.sort().reverse() : left.sort();
}

/** The frames of a panel's targets, and what was asked. */
export async function framesOf(panel: any, widthPixels: number, values: Values, settings: Settings) {
  const targets = (panel.targets ?? []).filter((target: any) => !target.hide);
  const frames: DataFrame[] = [];
  for (const target of targets) {
    const points = panel.maxDataPoints ?? Math.max(100, Math.floor(widthPixels));
    const least = rangeUtil.intervalToSeconds(panel.interval || target.interval || "1s");
    const span = settings.to - settings.from;
    const step = Math.max(least, rangeUtil.roundInterval((span / points) * 1000) / 1000, 1);
    const rate = Math.max(step + settings.scrapeSeconds, 4 * settings.scrapeSeconds);
    const expr = substitute(target.expr, values, {
      __range: `${span}s`, __range_s: String(span), __range_ms: String(span * 1000), __interval: `${step}s`,
      __interval_ms: String(step * 1000), __rate_interval: `${rate}s`,
    });
    if (target.instant && !target.range) {
      const { result } = await ask("query", { query: expr, time: settings.to });
      frames.push(...(target.format === "table" ? [tableOf(result, target, targets.length)] : vector(result, target)));
    } else {
      const start = Math.floor(settings.from / step) * step; // as Grafana aligns it
      const { result } = await ask("query_range", { query: expr, start, end: settings.to, step });
      frames.push(...matrix(result, target, start, settings.to, step));
    }
  }
  return frames;
}

const nameOf = (labels: Record<string, string>, target: any): string => {
  const format = target.legendFormat;
  if (format && format !== "__auto") return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_: string, label: string) => labels[label] ?? "");
  const { __name__: name = "", ...rest } = labels;
  const inner = Object.entries(rest).map(([key, value]) => `${key}="${value}"`).join(", ");
  return inner || !name ? `${name}{${inner}}` : name;
};

const plain = (text: string) => (text === "NaN" ? NaN : text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));

function series(times: number[], numbers: (number | null)[], labels: any, target: any): DataFrame {
  return toDataFrame({
    refId: target.refId,
    name: nameOf(labels, target),
    meta: { type: "timeseries-multi" },
    fields: [
      { name: "Time", type: FieldType.time, values: times, config: {} },
      { name: "Value", type: FieldType.number, values: numbers, labels, config: { displayNameFromDS: nameOf(labels, target) } },
    ],
  });
}

const vector = (result: any[], target: any): DataFrame[] =>
  result.map(({ metric, value }) => series([value[0] * 1000], [plain(value[1])], metric, target));

/** A step that has no sample is a hole, which a line is not drawn through. */
function matrix(result: any[], target: any, start: number, end: number, step: number): DataFrame[] {
  return result.map(({ metric, values }) => {
    const known = new Map<number, number>(values.map(([time, value]: [number, string]) => [Math.round(time * 1000), plain(value)]));
    const times: number[] = [];
    for (let time = start; time <= end + 1e-6; time += step) times.push(Math.round(time * 1000));
    return series(times, times.map((time) => known.get(time) ?? null), metric, target);
  });
}

function tableOf(result: any[], target: any, nTargets: number): DataFrame {
  const labels = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))].sort();
  const frame = new MutableDataFrame({ refId: target.refId, fields: [] });
  frame.addField({ name: "Time", type: FieldType.time, values: result.map(({ value }) => value[0] * 1000) });
  for (const label of labels) {
    frame.addField({ name: label, type: FieldType.string, values: result.map(({ metric }) => metric[label] ?? "") });
  }
  const name = nTargets > 1 ? `Value #${target.refId}` : "Value";
  frame.addField({ name, type: FieldType.number, values: result.map(({ value }) => plain(value[1])) });
  return toDataFrame(frame);
}
