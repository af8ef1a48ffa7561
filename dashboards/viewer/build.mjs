// Bundles the page into build/; npm run build.
import { build } from "esbuild";
import { createRequire } from "node:module";

// Their CommonJS builds: for an .mjs that imports CommonJS, esbuild takes "default" as Node does, and a table's scroll
// bars would be no component.
const { resolve } = createRequire(import.meta.url);
const alias = Object.fromEntries(["@grafana/ui", "@grafana/data", "@grafana/schema"].map((name) => [name, resolve(name)]));

await build({
  entryPoints: { viewer: "src/main.tsx" },
  outdir: "build",
  bundle: true,
  minify: true,
  format: "iife",
  jsx: "automatic",
  alias,
  loader: { ".svg": "text", ".png": "dataurl", ".woff2": "dataurl", ".woff": "dataurl", ".ttf": "dataurl" },
  define: { "process.env.NODE_ENV": '"production"', global: "window" },
  logLevel: "warning",
});
