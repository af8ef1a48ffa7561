// One dashboard on one page; when all panels stand, the title says "drawn" and the server hears what each holds.
import { createTheme, DataFrame, dateTime, FieldType, TimeRange } from "@grafana/data";
import { GlobalStyles, PanelChrome, PortalContainer } from "@grafana/ui";
import { ThemeContext } from "@grafana/data";
import "@fontsource/inter/latin-400.css"; // measured texts are cut where a wider font stands in for it
import "@fontsource/inter/latin-500.css";
import "uplot/dist/uPlot.min.css";
import { Component, ReactNode, useEffect } from "react";
import { createRoot } from "react-dom/client";

import { HeatmapPanel, Nothing, StateTimelinePanel, XyPanel } from "./drawn";
import { dressed } from "./fields";
import { BarGaugePanel, Drawn, StatPanel, TablePanel, TextPanel, TimeSeriesPanel } from "./panels";
import { framesOf, resolveVariables, Settings, substitute, Values } from "./queries";

const KINDS: Record<string, (drawn: Drawn) => ReactNode> = {
  timeseries: TimeSeriesPanel, stat: StatPanel, bargauge: BarGaugePanel, table: TablePanel, text: TextPanel,
  xychart: XyPanel, heatmap: HeatmapPanel, "state-timeline": StateTimelinePanel,
};
const COLUMNS = 24, ROW = 38, GAP = 8, HEAD = 74;
const theme = createTheme({ colors: { mode: "dark" } });

interface Placed { panel: any; frames: DataFrame[]; error?: string; x: number; y: number; width: number; height: number }

/** Panels in one list, those of folded rows too: a picture has nobody to unfold them. */
function unfolded(panels: any[]): any[] {
  const list: any[] = [];
  let shift = 0;
  for (const panel of panels) {
    list.push({ ...panel, gridPos: { ...panel.gridPos, y: panel.gridPos.y + shift } });
    if (panel.type !== "row" || !panel.collapsed || !panel.panels?.length) continue;
    const top = panel.gridPos.y + 1 + shift;
    const lowest = Math.min(...panel.panels.map((inner: any) => inner.gridPos.y));
    const inner = panel.panels.map((p: any) => ({ ...p, gridPos: { ...p.gridPos, y: p.gridPos.y - lowest + top } }));
    list.push(...inner);
    shift += Math.max(...inner.map((p: any) => p.gridPos.y + p.gridPos.h)) - top;
  }
  return list;
}

async function place(panel: any, values: Values, settings: Settings, wide: number): Promise<Placed> {
  const { x, y, w, h } = panel.gridPos;
  const column = (wide - GAP) / COLUMNS;
  const spot = { x: GAP + x * column, y: HEAD + y * ROW, width: w * column - GAP, height: h * ROW - GAP };
  if (panel.type === "row") return { panel, frames: [], ...spot };
  try {
    const frames = await framesOf(panel, spot.width, values, settings);
    return { panel, frames: await dressed(panel, frames, theme, (text, scoped) => substitute(ofField(text, scoped), values)), ...spot };
  } catch (error) {
    return { panel, frames: [], error: String(error), ...spot };
  }
}

/** ${__field.labels.x} in the words of the field that is looked at. */
const ofField = (text: string, scoped?: any) => {
  const field = scoped?.__dataContext?.value?.field;
  return field ? text.replace(/\$\{__field\.labels\.(\w+)\}/g, (_, label) => field.labels?.[label] ?? "") : text;
};

class Guard extends Component<{ title: string; children: ReactNode }, { error?: string }> {
  state: { error?: string } = {};
  static getDerivedStateFromError(error: unknown) { return { error: String(error) }; }
  componentDidCatch(error: unknown) { broken[this.props.title] = String(error); }
  render() { return this.state.error ? <pre style={{ color: "#f55", whiteSpace: "pre-wrap" }}>{this.state.error}</pre> : this.props.children; }
}
const broken: Record<string, string> = {};

const isEmpty = ({ panel, frames }: Placed) =>
  panel.type !== "text" && !frames.some((frame) => frame.length > 0 && frame.fields.some((f) => f.type !== FieldType.time && f.values.some((v: any) => v !== null && v !== undefined)));

function Page({ dashboard, placed, values, timeRange, onDrawn }: { dashboard: any; placed: Placed[]; values: Values; timeRange: TimeRange; onDrawn: () => void }) {
  useEffect(() => { const timer = setTimeout(onDrawn, 800); return () => clearTimeout(timer); }, []);
  const shown = (dashboard.templating?.list ?? []).filter((v: any) => v.type !== "datasource" && v.hide !== 2);
  return (
    <div style={{ background: theme.colors.background.canvas, position: "relative", minHeight: "100vh" }}>
      <div style={{ padding: "8px 12px", fontSize: 18, fontWeight: 500 }}>{dashboard.title}</div>
      <div style={{ padding: "0 12px", display: "flex", gap: 12, fontSize: 12 }}>
        {shown.map((v: any) => <span key={v.name}><span style={{ color: theme.colors.text.secondary }}>{v.label ?? v.name}</span> {values[v.name].all ? "All" : values[v.name].values.join(" + ")}</span>)}
        <span style={{ marginLeft: "auto", color: theme.colors.text.secondary }}>{timeRange.from.utc().format("YYYY-MM-DD HH:mm:ss")} to {timeRange.to.utc().format("HH:mm:ss")} UTC</span>
      </div>
      {placed.map((spot) => {
        const { panel, frames, error, x, y, width, height } = spot;
        const at = { position: "absolute" as const, left: x, top: y, width, height };
        if (panel.type === "row") return <div key={panel.id} style={{ ...at, fontWeight: 500, paddingTop: 4 }}>⌄ {panel.title}</div>;
        const Kind = KINDS[panel.type];
        return (
          <div key={panel.id} style={at}>
            <PanelChrome title={substitute(panel.title ?? "", values)} width={width} height={height}>
              {(innerWidth, innerHeight) => (
                <Guard title={panel.title}>
                  {error ? <pre style={{ color: theme.colors.error.text, whiteSpace: "pre-wrap" }}>{error}</pre>
                    : !Kind ? <pre>no panel of type {panel.type} here</pre>
                    : isEmpty(spot) ? (panel.fieldConfig?.defaults?.noValue ? <NoValue text={panel.fieldConfig.defaults.noValue} /> : <Nothing />)
                    : <Kind panel={panel} frames={frames} theme={theme} timeRange={timeRange} width={innerWidth} height={innerHeight} />}
                </Guard>
              )}
            </PanelChrome>
          </div>
        );
      })}
    </div>
  );
}

const NoValue = ({ text }: { text: string }) => <div style={{ display: "flex", height: "100%", alignItems: "center", justifyContent: "center", fontSize: 22 }}>{text}</div>;

async function main() {
  const [dashboard, settings]: [any, Settings] = await Promise.all([fetch("/dashboard.json"), fetch("/settings.json")].map(async (r) => (await r).json())) as any;
  Date.now = () => settings.to * 1000; // "in 5 minutes" is meant from the end of the time range
  await Promise.all([400, 500].map((weight) => document.fonts.load(`${weight} 14px Inter`))); // before texts are measured
  const values = await resolveVariables(dashboard, settings);
  const placed = await Promise.all(unfolded(dashboard.panels).map((panel) => place(panel, values, settings, window.innerWidth)));
  const [from, to] = [dateTime(settings.from * 1000), dateTime(settings.to * 1000)];
  const timeRange = { from, to, raw: { from, to } };
  const tell = async () => {
    const panels = placed.filter(({ panel }) => panel.type !== "row").map((spot) => ({
      title: spot.panel.title, type: spot.panel.type, frames: spot.frames.length, rows: Math.max(0, ...spot.frames.map((f) => f.length)),
      empty: isEmpty(spot), says: spot.panel.fieldConfig?.defaults?.noValue, error: spot.error ?? broken[spot.panel.title],
    }));
    await fetch("/drawn", { method: "POST", body: JSON.stringify({ title: dashboard.title, variables: values, panels }) });
    document.title = "drawn";
  };
  createRoot(document.getElementById("root")!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <Page dashboard={dashboard} placed={placed} values={values} timeRange={timeRange} onDrawn={tell} />
      <PortalContainer />
    </ThemeContext.Provider>
  );
}

main().catch((error) => {
  document.body.textContent = String(error);
  fetch("/drawn", { method: "POST", body: JSON.stringify({ error: String(error) }) });
});
