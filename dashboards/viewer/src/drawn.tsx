// Panels whose plugins are not in @grafana/ui, drawn here from the same frames: xychart, heatmap, state-timeline.
import { DataFrame, Field, FieldType, fieldMatchers, formattedValueToString, getFieldDisplayName } from "@grafana/data";
import { VizLegend } from "@grafana/ui";
import * as d3 from "d3";

import { Drawn } from "./panels";

const LEFT = 74, RIGHT = 14, TOP = 8, BOTTOM = 40, LEGEND_ROW = 24;
const text = (field: Field, value: unknown) => (field.display ? formattedValueToString(field.display(value)) : String(value));
const first = (frame: DataFrame, type: FieldType) => frame.fields.find((field) => field.type === type);
const clock = d3.utcFormat("%H:%M:%S");

const LONGEST = 32;
const shortened = (name: string) => (name.length > LONGEST ? `${name.slice(0, LONGEST - 1)}…` : name);
/** Room for names at the left, pixels. */
const margin = (names: string[], fontPixels: number) => 14 + 0.6 * fontPixels * Math.max(4, ...names.map((name) => Math.min(LONGEST, name.length)));

function Axis({ scale, field, size, length, side, theme, label }: any) {
  const isX = side === "x";
  const marks = (scale.ticks ? scale.ticks(Math.max(2, length / (isX ? 90 : 45))) : scale.domain()) as any[];
  const shown = marks.length > 12 && scale.base ? marks.filter((_, i) => i % Math.ceil(marks.length / 6) === 0) : marks;
  return (
    <g fill={theme.colors.text.secondary} fontSize={12}>
      {shown.map((mark, i) => {
        const at = scale(mark) + (scale.bandwidth ? scale.bandwidth() / 2 : 0);
        const words = mark instanceof Date ? clock(mark) : field ? text(field, mark) : String(mark);
        return isX ? (
          <g key={i} transform={`translate(${at},0)`}>
            {!scale.bandwidth && <line y1={0} y2={-size} stroke={theme.colors.border.weak} />}
            <text y={16} textAnchor="middle">{words}</text>
          </g>
        ) : (
          <g key={i} transform={`translate(0,${at})`}>
            {!scale.bandwidth && <line x1={0} x2={size} stroke={theme.colors.border.weak} />}
            <text x={-8} dy="0.35em" textAnchor="end">{words.length > 26 ? `${words.slice(0, 25)}…` : words}</text>
          </g>
        );
      })}
      {label && isX && <text x={length / 2} y={34} textAnchor="middle">{label}</text>}
      {label && !isX && <text transform={`translate(${-LEFT + 14},${length / 2}) rotate(-90)`} textAnchor="middle">{label}</text>}
    </g>
  );
}

function scaleOf(field: Field, values: number[], range: [number, number]) {
  const custom: any = field.config.custom ?? {};
  const [low = 0, high = 1] = d3.extent(values) as [number, number];
  if (custom.scaleDistribution?.type === "log") return d3.scaleLog().domain([low, high]).nice().range(range);
  return d3.scaleLinear().domain([field.config.min ?? low, field.config.max ?? high]).nice().range(range);
}

/** The fields of each series of the schema of Grafana 11: matchers for x, y, size and colour. */
function xySeries(panel: any, frames: DataFrame[]) {
  const found: { frame: DataFrame; x: Field; y: Field; name: string }[] = [];
  const match = (spec: any, frame: DataFrame) =>
    spec && frame.fields.find((field) => fieldMatchers.get(spec.matcher.id).get(spec.matcher.options)(field, frame, frames));
  for (const series of panel.options?.series ?? [{}]) {
    for (const frame of frames) {
      if (series.frame && frames.indexOf(frame) !== series.frame.matcher.options) continue;
      const numbers = frame.fields.filter((field) => field.type === FieldType.number);
      const x = match(series.x, frame) ?? (series.x ? undefined : numbers[0]);
      const ys = series.y ? [match(series.y, frame)] : numbers.filter((field) => field !== x);
      for (const y of ys) if (x && y) found.push({ frame, x, y, name: series.name?.fixed ?? getFieldDisplayName(y, frame, frames) });
    }
  }
  return found;
}

export function XyPanel({ panel, frames, theme, width, height }: Drawn) {
  const all = xySeries(panel, frames);
  if (!all.length) return <Nothing />;
  const w = width - LEFT - RIGHT, h = height - TOP - BOTTOM - LEGEND_ROW;
  const keep = (v: number) => Number.isFinite(v);
  const x = scaleOf(all[0].x, all.flatMap((s) => [...s.x.values]).filter(keep), [0, w]);
  const y = scaleOf(all[0].y, all.flatMap((s) => [...s.y.values]).filter(keep), [h, 0]);
  const own = (i: number) => theme.visualization.getColorByName(theme.visualization.palette[i % theme.visualization.palette.length]);
  const colour = (i: number, field: Field, value: number) => {
    const mode = field.config.color?.mode ?? "palette-classic";
    return mode === "fixed" || mode === "thresholds" || mode.startsWith("continuous") ? field.display!(value).color : own(i);
  };
  const items = all.map((s, i) => ({ label: s.name, color: colour(i, s.y, s.y.values[0]), yAxis: 1 }));
  return (
    <div>
      <svg width={width} height={height - LEGEND_ROW} style={{ display: "block" }}>
        <g transform={`translate(${LEFT},${TOP})`}>
          <Axis scale={y} field={all[0].y} size={w} length={h} side="y" theme={theme} label={(all[0].y.config.custom as any)?.axisLabel} />
          <g transform={`translate(0,${h})`}>
            <Axis scale={x} field={all[0].x} size={h} length={w} side="x" theme={theme} label={(all[0].x.config.custom as any)?.axisLabel || getFieldDisplayName(all[0].x)} />
          </g>
          {all.map((s, i) => [...s.x.values].map((value, row) =>
            keep(value) && keep(s.y.values[row]) ? (
              <circle key={`${i}.${row}`} cx={x(value)} cy={y(s.y.values[row])} r={((s.y.config.custom as any)?.pointSize?.fixed ?? 8) / 2} fill={colour(i, s.y, s.y.values[row])} fillOpacity={0.8} />
            ) : null))}
        </g>
      </svg>
      <VizLegend items={items} placement="bottom" displayMode={"list" as any} />
    </div>
  );
}

const DIVERGING = ["BrBG", "PRGn", "PiYG", "PuOr", "RdBu", "RdGy", "RdYlBu", "RdYlGn", "Spectral"];
const BRIGHT_IS_MUCH = ["Turbo", "Cividis", "Viridis", "Magma", "Inferno", "Plasma", "Warm", "Cool", "CubehelixDefault", "Rainbow", "Sinebow"];
/** Grafana turns diverging schemes always, and on dark ground those that end dark. */
const reversedInTheDark = (scheme: string) => DIVERGING.includes(scheme) || !BRIGHT_IS_MUCH.includes(scheme);

/** Rows of a heat map: one a series, named as its legend, or by the upper bound of a bucket. */
export function HeatmapPanel({ panel, frames, theme, width, height }: Drawn) {
  const fields = frames.flatMap((frame) => frame.fields.filter((f) => f.type === FieldType.number).map((field) => ({ frame, field, time: first(frame, FieldType.time)! })));
  if (!fields.length) return <Nothing />;
  const options = panel.options?.color ?? {};
  const scheme = (d3 as any)[`interpolate${options.scheme ?? "Oranges"}`] ?? d3.interpolateOranges;
  const values = fields.flatMap(({ field }) => field.values.filter((v: any) => Number.isFinite(v)));
  const low = options.min ?? Math.min(0, d3.min(values) as number), high = options.max ?? (d3.max(values) as number);
  const reversed = reversedInTheDark(options.scheme ?? "Oranges") !== Boolean(options.reverse);
  const shade = (v: number) => scheme(Math.abs(Number(reversed) - Math.min(1, Math.max(0, (v - low) / (high - low || 1)))));
  const hidden = { le: 1e-9, ge: Infinity, ...panel.options?.filterValues }; // cells without a colour, as Grafana has it
  const times = [...fields[0].time.values] as number[];
  const step = times[1] - times[0] || 1000;
  const names = fields.map(({ field, frame }) => getFieldDisplayName(field, frame, frames));
  const left = margin(names, 11);
  const w = width - left - RIGHT, h = height - TOP - BOTTOM;
  const x = d3.scaleUtc().domain([times[0], times[times.length - 1] + step]).range([0, w]);
  const y = d3.scaleBand().domain(names.map((name, i) => `${i}\u0000${name}`)).range([h, 0]);
  const every = Math.ceil(names.length / Math.max(1, h / 14));
  return (
    <svg width={width} height={height} style={{ display: "block" }}>
      <g transform={`translate(${left},${TOP})`}>
        {y.domain().map((key, row) => (
          <g key={key}>
            {row % every === 0 && <text x={-6} y={y(key)! + y.bandwidth() / 2} dy="0.35em" textAnchor="end" fontSize={11} fill={theme.colors.text.secondary}>{shortened(names[row])}</text>}
            {[...fields[row].field.values].map((value: any, i) =>
              Number.isFinite(value) && value > hidden.le && value < hidden.ge ? <rect key={i} x={x(fields[row].time.values[i])} width={Math.max(1, x(times[0] + step))} shapeRendering="crispEdges" y={y(key)} height={y.bandwidth()} fill={shade(value)} /> : null)}
          </g>
        ))}
        <g transform={`translate(0,${h})`}><Axis scale={x} size={0} length={w} side="x" theme={theme} /></g>
        <g transform={`translate(0,${h + 24})`}>
          {d3.range(100).map((i) => <rect key={i} x={w - 260 + i * 1.6} width={1.8} height={8} fill={shade(low + ((high - low) * i) / 99)} />)}
          <text x={w - 266} y={8} textAnchor="end" fontSize={11} fill={theme.colors.text.secondary}>{text(fields[0].field, low)}</text>
          <text x={w - 94} y={8} fontSize={11} fill={theme.colors.text.secondary}>{text(fields[0].field, high)}</text>
        </g>
      </g>
    </svg>
  );
}

/** Stretches of one value, a row a series, coloured by mappings or thresholds. */
export function StateTimelinePanel({ panel, frames, theme, timeRange, width, height }: Drawn) {
  const rows = frames.flatMap((frame) => frame.fields.filter((f) => f.type !== FieldType.time).map((field) => ({ field, time: first(frame, FieldType.time)!, name: getFieldDisplayName(field, frame, frames) })));
  if (!rows.length) return <Nothing />;
  const left = margin(rows.map(({ name }) => name), 11), w = width - left - RIGHT, h = height - TOP - 26;
  const x = d3.scaleUtc().domain([timeRange.from.valueOf(), timeRange.to.valueOf()]).range([0, w]);
  const y = d3.scaleBand().domain(rows.map((_, i) => String(i))).range([0, h]).padding(1 - (panel.options?.rowHeight ?? 0.9));
  return (
    <svg width={width} height={height} style={{ display: "block" }}>
      <g transform={`translate(${left},${TOP})`}>
        {rows.map(({ field, time, name }, row) => (
          <g key={row} transform={`translate(0,${y(String(row))})`}>
            {y.bandwidth() > 8 && <text x={-8} y={y.bandwidth() / 2} dy="0.35em" textAnchor="end" fontSize={11} fill={theme.colors.text.primary}>{shortened(name)}</text>}
            {stretches([...time.values], [...field.values], timeRange.to.valueOf()).map(({ from, to, value }, i) => {
              const shown = field.display!(value);
              const size = x(to) - x(from);
              return (
                <g key={i}>
                  <rect x={x(from)} width={Math.max(0.5, size)} height={y.bandwidth()} fill={shown.color} fillOpacity={(panel.fieldConfig?.defaults?.custom?.fillOpacity ?? 70) / 100} />
                  {panel.options?.showValue !== "never" && size > 40 && y.bandwidth() > 12 && <text x={x(from) + 4} y={y.bandwidth() / 2} dy="0.35em" fontSize={11} fill={theme.colors.getContrastText(shown.color ?? "#888")}>{formattedValueToString(shown).slice(0, Math.floor(size / 7))}</text>}
                </g>
              );
            })}
          </g>
        ))}
        <g transform={`translate(0,${h})`}><Axis scale={x} size={0} length={w} side="x" theme={theme} /></g>
      </g>
    </svg>
  );
}

function stretches(times: number[], values: unknown[], end: number) {
  const found: { from: number; to: number; value: unknown }[] = [];
  const step = times[1] - times[0] || 1000;
  values.forEach((value, i) => {
    if (value === null || value === undefined) return;
    const last = found[found.length - 1];
    const to = Math.min(times[i] + step, end);
    if (last && last.value === value && last.to >= times[i]) last.to = to;
    else found.push({ from: times[i], to, value });
  });
  return found;
}

export function Nothing() {
  return <div style={{ display: "flex", height: "100%", alignItems: "center", justifyContent: "center", opacity: 0.7 }}>No data</div>;
}
