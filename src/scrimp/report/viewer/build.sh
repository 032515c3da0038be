#!/usr/bin/env bash
# Makes supersplat-viewer.min.js beside this file again, bit for bit, from released packages that are unpacked and
# never installed. What the pages do not use is left out: the viewer's own buttons and languages, WebGPU with its
# shaders (the pages draw with WebGL2, which is what is tested), headsets (whose profiles come from a network).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir -p viewer node_modules/playcanvas esbuild
npm pack --silent @playcanvas/supersplat-viewer@1.36.2 playcanvas@2.22.6 @esbuild/linux-x64@0.28.2 >/dev/null
tar xzf playcanvas-supersplat-viewer-1.36.2.tgz -C viewer --strip-components 1
tar xzf playcanvas-2.22.6.tgz -C node_modules/playcanvas --strip-components 1
tar xzf esbuild-linux-x64-0.28.2.tgz -C esbuild --strip-components 1

engine=node_modules/playcanvas/build/playcanvas/src
sed -i -e 's/\bconfig\.ui\b/false/' -e '/^import { Xr[A-Za-z]* }/d' -e '/parent\.script\.create(Xr/d' viewer/dist/viewer.js
sed -i 's/^import { WebgpuGraphicsDevice } .*/const WebgpuGraphicsDevice = null;/' \
  "$engine/platform/graphics/graphics-device-create.js"
grep -rl '_default as default' "$engine/scene/shader-lib/wgsl/chunks" --include='*.js' | grep -v /skybox/ |
  xargs perl -0pi -e 's/= (\/\*.*?\*\/ )?`.*`;/= "";/s'

echo 'export { createViewer } from "./viewer/dist/viewer.js";' >entry.js
esbuild/bin/esbuild entry.js --bundle --minify --format=iife --global-name=SuperSplat --target=es2022 \
  --legal-comments=inline --pure:console.log --external:node:worker_threads --log-level=error \
  --outfile="$here/supersplat-viewer.min.js"
cat viewer/LICENSE >"$here/LICENSE"
(cd "$here" && sha256sum supersplat-viewer.min.js)
