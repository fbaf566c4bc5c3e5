// Open a built page in headless Chromium, give it an audio file, and print the phones:
//
//   npm install puppeteer-core && node docs/web/check.mjs FOLDER SPEECH.wav SCREENSHOT.png
//
// CHROMIUM names the browser, /usr/bin/chromium by default. Requests to other places than the folder fail the check.

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, normalize } from "node:path";

const puppeteer = createRequire(join(process.cwd(), "package.json"))("puppeteer-core");
const [folder, audio, screenshot] = process.argv.slice(2);
const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };

const server = createServer(async (request, response) => {
  const path = normalize(new URL(request.url, "http://localhost").pathname.replace(/\/$/, "/index.html"));
  try {
    const body = await readFile(join(folder, path));
    response.writeHead(200, { "Content-Type": types[extname(path)] ?? "application/octet-stream" });
    response.end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const origin = `http://127.0.0.1:${server.address().port}`;

const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const browser = await puppeteer.launch({ executablePath, headless: true, args: ["--no-sandbox"], protocolTimeout: 600000 });
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(300000);
  const elsewhere = [];
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(origin) && !/^(blob|data):/.test(url)) elsewhere.push(url);
  });
  page.on("pageerror", (error) => console.error(error.message));
  const finished = (pattern) =>
    page.waitForFunction((p) => new RegExp(p).test(document.getElementById("status").textContent), {}, pattern);
  await page.goto(origin);
  await finished("Ready|Failed");
  await (await page.$("#file")).uploadFile(audio);
  await finished("of audio in|Failed");
  if (screenshot) await page.screenshot({ path: screenshot });
  console.log(await page.$eval("#status", (node) => node.textContent));
  console.log(await page.$eval("#phones", (node) => node.textContent));
  if (elsewhere.length) throw new Error(`requests to other places: ${elsewhere.join(", ")}`);
} finally {
  await browser.close();
  server.close();
}
