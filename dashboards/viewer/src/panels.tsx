// Panels that @grafana/ui itself draws: timeseries, stat, bargauge, table, text.
import { DataFrame, FieldDisplay, getFieldDisplayValues, GrafanaTheme2, TimeRange } from "@grafana/data";
import { VizOrientation } from "@grafana/schema";
import {
  BarGauge, BigValue, BigValueColorMode, BigValueGraphMode, BigValueTextMode, Table, TimeSeries, VizRepeater,
} from "@grafana/ui";

export interface Drawn {
  panel: any;
  frames: DataFrame[];
  theme: GrafanaTheme2;
  timeRange: TimeRange;
  width: number;
  height: number;
}

const LEGEND = { showLegend: true, displayMode: "list", placement: "bottom", calcs: [] };

export function TimeSeriesPanel({ panel, frames, timeRange, width, height }: Drawn) {
  const legend = { ...LEGEND, ...panel.options?.legend };
  const graphed = sorted(frames, legend);
  return <TimeSeries frames={graphed} timeRange={timeRange} timeZone="utc" width={width} height={height} legend={legend} options={panel.options} />;
}

/** A legend sorts its own rows in Grafana after a click; sortBy in the JSON is that click. */
function sorted(frames: DataFrame[], legend: any): DataFrame[] {
  return legend.sortBy === "Name" ? [...frames].sort((a, b) => (a.name ?? "").localeCompare(b.name ?? "")) : frames;
}

function displays({ panel, frames, theme }: Drawn): FieldDisplay[] {
  const reduceOptions = { calcs: ["lastNotNull"], ...panel.options?.reduceOptions };
  return getFieldDisplayValues({
    data: frames, reduceOptions, fieldConfig: { defaults: {}, overrides: [], ...panel.fieldConfig },
    replaceVariables: (text) => text, theme, timeZone: "utc", sparkline: panel.options?.graphMode === "area",
  });
}

export function StatPanel(drawn: Drawn) {
  const { panel, theme, width, height } = drawn;
  const options = panel.options ?? {};
  const values = displays(drawn);
  return (
    <VizRepeater
      source={values} getValues={() => values} width={width} height={height} renderCounter={0}
      orientation={options.orientation ?? VizOrientation.Auto}
      renderValue={({ value, width, height, count }: any) => (
        <BigValue
          value={value.display} width={width} height={height} theme={theme} sparkline={value.sparkline} count={count}
          colorMode={options.colorMode ?? BigValueColorMode.Value} graphMode={options.graphMode ?? BigValueGraphMode.None}
          textMode={options.textMode ?? BigValueTextMode.Auto} justifyMode={options.justifyMode}
        />
      )}
    />
  );
}

export function BarGaugePanel(drawn: Drawn) {
  const { panel, theme, width, height } = drawn;
  const options = panel.options ?? {};
  const values = displays(drawn);
  const orientation = options.orientation === "auto" || !options.orientation ? VizOrientation.Horizontal : options.orientation;
  return (
    <div style={{ width, height, overflow: "hidden" }}>
      <VizRepeater
        source={values} getValues={() => values} width={width} height={height} renderCounter={0} orientation={orientation}
        minVizHeight={options.sizing === "manual" ? options.minVizHeight ?? 16 : 16} itemSpacing={6}
        maxVizHeight={options.sizing === "manual" ? options.maxVizHeight ?? 300 : 300}
        renderValue={({ value, width, height, orientation }: any) => (
          <BarGauge
            value={value.display} field={value.field} width={width} height={height} orientation={orientation} theme={theme}
            displayMode={options.displayMode} showUnfilled={options.showUnfilled} itemSpacing={6} lcdCellWidth={8}
            valueDisplayMode={options.valueMode} namePlacement={options.namePlacement} alignmentFactors={longest(values)}
          />
        )}
      />
    </div>
  );
}

/** Room for the longest title and text, so that all bars begin at one place. */
function longest(values: FieldDisplay[]): any {
  const text = (of: (value: FieldDisplay) => string) => values.map(of).reduce((a, b) => (b.length > a.length ? b : a), "");
  return { title: text((value) => value.display.title ?? ""), text: text((value) => `${value.display.prefix ?? ""}${value.display.text}${value.display.suffix ?? ""}`) };
}

export function TablePanel({ panel, frames, width, height }: Drawn) {
  const [first] = frames;
  return <Table data={first} width={width} height={height} initialSortBy={panel.options?.sortBy} cellHeight={panel.options?.cellHeight} noHeader={panel.options?.showHeader === false} />;
}

export function TextPanel({ panel }: Drawn) {
  return <div style={{ whiteSpace: "pre-wrap" }}>{panel.options?.content}</div>;
}
