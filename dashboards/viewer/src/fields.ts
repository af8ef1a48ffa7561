// Grafana's own transformations and field options, without Grafana: its registries are filled here.
import {
  applyFieldOverrides, DataFrame, dataLinksOverrideProcessor, Field, FieldConfigOptionsRegistry, FieldType, getFieldDisplayName, GrafanaTheme2,
  displayNameOverrideProcessor, identityOverrideProcessor, numberOverrideProcessor, standardTransformers,
  standardTransformersRegistry, thresholdsOverrideProcessor, transformDataFrame, unitOverrideProcessor,
  valueMappingsOverrideProcessor,
} from "@grafana/data";
import { lastValueFrom, map } from "rxjs";

/** Grafana keeps this one outside of @grafana/data: a frame for each combination of values of some fields. */
const partitionByValues = {
  id: "partitionByValues", name: "Partition by values", defaultOptions: {},
  operator: ({ fields = [], keepFields = false, naming = { asLabels: true } }: any) => map((frames: DataFrame[]) => frames.flatMap((frame) => {
    const keys = fields.map((name: string) => frame.fields.find((field) => getFieldDisplayName(field, frame) === name)).filter(Boolean);
    if (!keys.length) return [frame];
    const rows = new Map<string, number[]>();
    for (let row = 0; row < frame.length; row++) {
      const key = JSON.stringify(keys.map((field: Field) => field.values[row]));
      rows.set(key, [...(rows.get(key) ?? []), row]);
    }
    return [...rows.values()].map((chosen): DataFrame => {
      const labels = Object.fromEntries(keys.map((field: Field) => [field.name, String(field.values[chosen[0]])]));
      const kept = frame.fields.filter((field) => keepFields || !keys.includes(field));
      return {
        ...frame, length: chosen.length, name: naming.asLabels === false ? Object.values(labels).join(" ") : frame.name,
        fields: kept.map((field) => ({
          ...field, state: undefined, values: chosen.map((row) => field.values[row]),
          labels: naming.asLabels === false ? field.labels : { ...field.labels, ...labels },
        })),
      };
    });
  })),
};
const byId = new Map([...Object.values(standardTransformers), partitionByValues].map((one: any) => [one.id, one])); // some have two names
standardTransformersRegistry.setInit(() =>
  [...byId.values()].map((transformation: any) => ({ id: transformation.id, name: transformation.name, transformation, editor: () => null })) as any
);

const PROCESSORS: Record<string, any> = {
  unit: unitOverrideProcessor, min: numberOverrideProcessor, max: numberOverrideProcessor, decimals: numberOverrideProcessor,
  displayName: displayNameOverrideProcessor, noValue: identityOverrideProcessor, color: identityOverrideProcessor,
  thresholds: thresholdsOverrideProcessor, mappings: valueMappingsOverrideProcessor, links: dataLinksOverrideProcessor,
  fieldMinMax: identityOverrideProcessor, description: identityOverrideProcessor, filterable: identityOverrideProcessor,
};

/** All options that a panel sets, each known to the registry, or `applyFieldOverrides` would drop it. */
function registryFor(fieldConfig: any): FieldConfigOptionsRegistry {
  const custom = new Set<string>(Object.keys(fieldConfig.defaults?.custom ?? {}));
  for (const { properties } of fieldConfig.overrides ?? []) {
    for (const { id } of properties) if (id.startsWith("custom.")) custom.add(id.slice("custom.".length));
  }
  const item = (id: string, path: string, process: any, isCustom: boolean) => ({
    id, path, name: id, process, isCustom, editor: () => null, override: () => null, settings: { expandTemplateVars: true },
    shouldApply: (field: Field) => path !== "axisLabel" || (field.type !== FieldType.time && field.type !== FieldType.string), // as Grafana has it
  });
  return new FieldConfigOptionsRegistry(() => [
    ...Object.entries(PROCESSORS).map(([id, process]) => item(id, id, process, false)),
    ...[...custom].map((path) => item(`custom.${path}`, path, identityOverrideProcessor, true)),
  ] as any);
}

const BY_SERIES = ["timeseries", "xychart"]; // where a series has a colour of its own unless the JSON says otherwise

/** Transformed frames with units, colours, thresholds and overrides. */
export async function dressed(panel: any, frames: DataFrame[], theme: GrafanaTheme2, replace: (text: string, scoped?: any) => string) {
  const transformed = await lastValueFrom(transformDataFrame(panel.transformations ?? [], frames));
  const fieldConfig = { defaults: {}, overrides: [], ...panel.fieldConfig };
  if (!fieldConfig.defaults.color && BY_SERIES.includes(panel.type)) {
    fieldConfig.defaults = { ...fieldConfig.defaults, color: { mode: "palette-classic" } };
  }
  return applyFieldOverrides({
    data: transformed, fieldConfig, fieldConfigRegistry: registryFor(fieldConfig), replaceVariables: replace, theme,
    timeZone: "utc",
  });
}
