"""The page at /: choose an image, see its classes. It asks the service itself and nothing else."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fieldmark</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 40rem;
         padding: 0 1rem; color: #222; background: #fff }
  label.drop { display: block; border: 2px dashed #999; border-radius: .5rem; padding: 2rem;
               text-align: center; cursor: pointer }
  label.drop.over, label.drop:focus-within { border-color: #1f77b4; background: #f3f8fc }
  input[type=file] { position: absolute; opacity: 0; width: 1px }
  img { display: block; max-width: 100%; max-height: 16rem; margin: 1rem auto }
  table { width: 100%; border-collapse: collapse }
  td { padding: .2rem .5rem .2rem 0; vertical-align: middle }
  td:nth-child(2) { width: 45% }
  td:last-child { text-align: right; font-variant-numeric: tabular-nums }
  .bar { background: #1f77b4; height: .9rem; border-radius: .2rem; min-width: 1px }
  .error { color: #b00020 }
  footer, small { color: #666 }
</style>
<h1>fieldmark</h1>
<label class="drop" id="drop">Choose an image, or drop it here
  <input type="file" id="file" accept="image/jpeg,image/png,image/webp"></label>
<p><label>Key, if the service asks for one: <input id="key" type="password" autocomplete="off">
</label></p>
<div id="shown" aria-live="polite"></div>
<footer>The same by a program: <code>curl --data-binary @image.jpg <span id="url"></span></code>.
<a href="/docs">All paths</a></footer>
<script>
"use strict";
const find = id => document.getElementById(id), shown = find("shown"), drop = find("drop");
find("url").textContent = new URL("v1/classify", location.href).href;
const make = (name, text = "", parent = null) => {
  const one = document.createElement(name);
  one.textContent = text;
  if (parent) parent.append(one);
  return one;
};
async function classify(file) {
  if (!file) return;
  const mine = document.createElement("div");  // an answer that comes after the next choice is lost
  shown.replaceChildren(mine);
  const image = make("img", "", mine);
  image.alt = file.name;
  image.src = URL.createObjectURL(file);
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  const said = make("p", "...", mine), key = find("key").value.trim(), began = performance.now();
  try {
    const headers = key ? { Authorization: "Bearer " + key } : {};
    const reply = await fetch("v1/classify", { method: "POST", body: file, headers });
    const body = await reply.json(), took = Math.round(performance.now() - began);
    if (!reply.ok) throw new Error(body.error.message);
    said.remove();
    const table = make("table", "", mine);
    for (const one of body.predictions) {
      const row = make("tr", "", table);
      make("td", one.description || one.class_name, row).title = one.class_name;
      const bar = make("div", "", make("td", "", row));
      bar.className = "bar";
      bar.style.width = 100 * one.probability + "%";
      make("td", (100 * one.probability).toFixed(1) + " %", row);
    }
    make("small", took + " ms; model " + body.model.slice(0, 12), mine);
  } catch (error) {
    said.textContent = error.message;
    said.className = "error";
  }
}
find("file").addEventListener("change", event => {
  classify(event.target.files[0]);
  event.target.value = "";  // so that the same file can be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) drop.addEventListener(kind, event => {
  event.preventDefault();
  drop.classList.toggle("over", kind === "dragover");
  if (kind === "drop") classify(event.dataTransfer.files[0]);
});
</script>
</html>
"""
