// Grafana's own transformations and field options, without Grafana: its registries are filled here.
import {
  applyFieldOverrides, DataFrame, FieldConfigOptionsRegistry, GrafanaTheme2, dataLinksOverrideProcessor,
  displayNameOverrideProcessor, identityOverrideProcessor, numberOverrideProcessor, standardTransformers,
  standardTransformersRegistry, thresholdsOverrideProcessor, transformDataFrame, unitOverrideProcessor,
  valueMappingsOverrideProcessor,
} from "@grafana/data";
import { lastValueFrom } from "rxjs";

const byId = new Map(Object.values(standardTransformers).map((transformation: any) => [transformation.id, transformation])); // some have two names
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
    id, path, name: id, process, isCustom, editor: () => null, override: () => null, settings: {}, shouldApply: () => true,
  });
  return new FieldConfigOptionsRegistry(() => [
    ...Object.entries(PROCESSORS).map(([id, process]) => item(id, id, process, false)),
    ...[...custom].map((path) => item(`custom.${path}`, path, identityOverrideProcessor, true)),
  ] as any);
}

const BY_SERIES = ["timeseries", "xychart"]; // where a series has a colour of its own unless the JSON says otherwise

/** Transformed frames with units, colours, thresholds and overrides. */
export async function dressed(panel: any, frames: DataFrame[], theme: GrafanaTheme2, replace: (text: string) => string) {
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
