// node shoot.mjs CHROMIUM WORK OUT: bundles page.jsx, draws every WORK/*.json, writes OUT/NAME.png.
// Exit code 1 when a page says an error or a panel is empty.
import { readFile, readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { build } from 'esbuild';
import { chromium } from 'playwright-core';

const [, , program, work, out] = process.argv;
const here = import.meta.dirname;

// Old packages keep what they export under `default`; an ES module's import of them finds the wrapper in its place.
const unwrapped = {
  name: 'unwrapped',
  setup(build) {
    const filter = /^(react-custom-scrollbars-2|react-highlight-words|rc-[a-z]+|@rc-component\/[a-z]+|react-table)$/;
    build.onResolve({ filter }, ({ path: name, namespace, importer }) =>
      namespace === 'unwrapped' || !importer.includes('@grafana') ? undefined : { path: name, namespace: 'unwrapped' });
    build.onLoad({ filter: /./, namespace: 'unwrapped' }, ({ path: name }) => ({
      contents: `const found = require(${JSON.stringify(name)});
module.exports = found.default ? Object.assign(found.default, found) : found;`,
      resolveDir: here,
    }));
  },
};

await build({
  plugins: [unwrapped],
  entryPoints: [path.join(here, 'page.jsx')],
  bundle: true,
  outfile: path.join(work, 'page.js'),
  jsx: 'automatic',
  format: 'iife',
  minify: true,
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: { '.svg': 'dataurl', '.woff2': 'dataurl', '.ttf': 'dataurl', '.woff': 'dataurl', '.png': 'dataurl' },
  logLevel: 'error',
});
const script = await readFile(path.join(work, 'page.js'), 'utf8');
const browser = await chromium.launch({
  executablePath: program,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--hide-scrollbars'],
});
let failed = 0;
try {
  for (const name of (await readdir(work)).filter((one) => one.endsWith('.json'))) {
    const data = await readFile(path.join(work, name), 'utf8');
    const page = await browser.newPage({ viewport: { width: 1440, height: 900 }, deviceScaleFactor: 1 });
    const errors = [];
    page.on('pageerror', (error) => errors.push(error.message));
    const html = path.join(work, `${name}.html`);
    await writeFile(html, `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css"><body style="margin:0"><div id="root"></div>
<script>window.PREVIEW = ${data.replaceAll('<', '\\u003c')};</script><script src="page.js"></script>`);
    await page.goto(`file://${html}`);
    await page.waitForSelector('[data-panel], #failed', { timeout: 30000 }).catch((error) => errors.push(error.message));
    await page.waitForTimeout(1500);
    const broken = await page.locator('#failed').allTextContents();
    const empty = await page.$$eval('[data-panel]', (all) =>
      all.filter((one) => !one.querySelector('canvas') && one.innerText.trim() === one.dataset.panel).map((one) => one.dataset.panel));
    for (const text of [...errors, ...broken, ...empty.map((one) => `${one}: nothing is drawn`)]) {
      console.error(`${name}: ${text}`);
      failed = 1;
    }
    await page.screenshot({ path: path.join(out, name.replace('.json', '.png')), fullPage: true });
    await page.close();
  }
} finally {
  await browser.close();
}
process.exit(failed);
