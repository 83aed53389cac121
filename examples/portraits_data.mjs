// Renders DiceBear's pixel-art avatars: option objects as a JSON list on standard input, raw RGBA
// pixels [n, 16, 16, 4] on standard output. Run by portraits_data.py.
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const from = createRequire(pathToFileURL(process.argv[2] + "/")); // the folder with node_modules/
const load = (name) => import(pathToFileURL(from.resolve(name)));
const { createAvatar } = await load("@dicebear/core");
const style = await load("@dicebear/pixel-art");
const { Resvg } = from("@resvg/resvg-js");

for (const options of JSON.parse(readFileSync(0))) {
  const svg = createAvatar(style, options).toString();
  const pixels = new Resvg(svg, { fitTo: { mode: "width", value: 16 } }).render().pixels;
  for (let sent = 0; sent < pixels.length; ) sent += writeSync(1, pixels, sent);
}
