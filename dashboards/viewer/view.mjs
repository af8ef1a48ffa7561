// node view.mjs DASHBOARD.json... --prometheus http://127.0.0.1:9090 [--seconds 300] [--to UNIX_SECONDS] [--scrape 5]
//   [--var run=replayed]... [--out FOLDER] [--width 1600] [--port 0]
// With --out: a PNG of each dashboard by chromium, and a line on each panel that is empty or broken. Without: serves the
// first dashboard until Ctrl-C.
import { spawn } from "node:child_process";
import { createReadStream, existsSync, mkdtempSync, readFileSync, renameSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";

const HERE = import.meta.dirname;
const PUBLIC = path.join(HERE, "node_modules/@grafana/ui/dist");
const PAGE = '<!doctype html><meta charset="utf-8"><title>drawing</title><link rel="stylesheet" href="/viewer.css"><body style="margin:0"><div id="root"></div><script>window.__grafana_public_path__="/public/"</script><script src="/viewer.js"></script>';
const [ROW, HEAD] = [38, 74]; // as src/main.tsx places panels
const PATIENCE_MS = 60_000;

const { values: options, positionals: files } = parseArgs({
  allowPositionals: true,
  options: {
    prometheus: { type: "string", default: "http://127.0.0.1:9090" },
    seconds: { type: "string", default: "300" },
    to: { type: "string" },
    scrape: { type: "string", default: "5" },
    var: { type: "string", multiple: true, default: [] },
    out: { type: "string" },
    width: { type: "string", default: "1600" },
    port: { type: "string", default: "0" },
  },
});
if (!files.length) throw new Error("name a dashboard's JSON, such as ../json/fleet.json");
if (!existsSync(path.join(HERE, "build/viewer.js"))) throw new Error("build/viewer.js is not there: npm ci && npm run build");

const variables = {};
for (const text of options.var) {
  const [name, value] = text.split(/=(.*)/s);
  (variables[name] ??= []).push(value);
}

let dashboard, settings, told;
const server = createServer(async (request, response) => {
  const { pathname, search } = new URL(request.url, "http://viewer");
  const json = (data) => response.setHeader("Content-Type", "application/json").end(JSON.stringify(data));
  if (pathname === "/") return response.setHeader("Content-Type", "text/html").end(PAGE);
  if (pathname === "/dashboard.json") return json(dashboard);
  if (pathname === "/settings.json") return json(settings);
  if (pathname === "/drawn") {
    let body = "";
    for await (const part of request) body += part;
    told?.(JSON.parse(body));
    return response.end();
  }
  if (pathname === "/viewer.js") return createReadStream(path.join(HERE, "build/viewer.js")).pipe(response);
  if (pathname === "/viewer.css") {
    return createReadStream(path.join(HERE, "build/viewer.css")).pipe(response.setHeader("Content-Type", "text/css"));
  }
  if (pathname.startsWith("/api/v1/")) {
    try {
      const answer = await fetch(options.prometheus + pathname + search);
      return response.writeHead(answer.status, { "Content-Type": "application/json" }).end(await answer.text());
    } catch (error) {
      return json({ status: "error", errorType: options.prometheus, error: String(error.cause ?? error) });
    }
  }
  const asset = path.normalize(path.join(PUBLIC, pathname));
  if (asset.startsWith(PUBLIC + path.sep) && existsSync(asset) && pathname.endsWith(".svg")) {
    return createReadStream(asset).pipe(response.setHeader("Content-Type", "image/svg+xml"));
  }
  response.writeHead(404).end();
});
await new Promise((resolve) => server.listen(Number(options.port), "127.0.0.1", resolve));
const url = `http://127.0.0.1:${server.address().port}/`;

function load(file) {
  dashboard = JSON.parse(readFileSync(file, "utf8"));
  const to = options.to ? Number(options.to) : Math.floor(Date.now() / 1000);
  settings = { from: to - Number(options.seconds), to, scrapeSeconds: Number(options.scrape), variables };
}

/** As high as the panels reach, those of folded rows included. */
function height() {
  let [bottom, folded] = [0, 0];
  for (const panel of dashboard.panels) {
    bottom = Math.max(bottom, panel.gridPos.y + panel.gridPos.h);
    const inner = panel.collapsed ? panel.panels ?? [] : [];
    if (inner.length) {
      const top = Math.min(...inner.map((p) => p.gridPos.y));
      folded += Math.max(...inner.map((p) => p.gridPos.y + p.gridPos.h)) - top;
    }
  }
  return HEAD + (bottom + folded) * ROW + 8;
}

async function photograph(file) {
  load(file);
  const profile = mkdtempSync(path.join(tmpdir(), "viewer-"));
  const picture = path.join(options.out, `dashboards-${path.basename(file, ".json")}.png`);
  const fresh = path.join(options.out, `.${path.basename(picture)}`); // chromium goes by the ending of a name
  const report = new Promise((resolve) => (told = resolve));
  const chromium = spawn("chromium", [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", `--user-data-dir=${profile}`,
    `--window-size=${options.width},${height()}`, "--virtual-time-budget=20000", `--screenshot=${fresh}`, url,
  ], { stdio: "ignore" });
  const ended = new Promise((resolve) => chromium.on("exit", resolve));
  const late = new Promise((resolve) => setTimeout(resolve, PATIENCE_MS, { error: "chromium took too long" }).unref());
  const drawn = await Promise.race([report, late, ended.then(() => ({ error: "chromium ended before the page stood" }))]);
  await Promise.race([ended, late]);
  chromium.kill();
  rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  if (drawn.error) throw new Error(`${file}: ${drawn.error}`);
  renameSync(fresh, picture);
  const poor = drawn.panels.filter((panel) => panel.empty || panel.error);
  const bad = poor.filter((panel) => panel.error || !panel.says); // one that says "none" means it
  console.log(`${picture}: ${drawn.panels.length} panels, ${bad.length} without data or broken`);
  for (const { title, type, error, says } of poor) console.log(`  ${type} "${title}": ${error ?? (says ? `says "${says}"` : "no data")}`);
}

if (options.out) {
  for (const file of files) await photograph(file);
  server.close();
  server.closeAllConnections();
} else {
  load(files[0]);
  console.log(url);
}
