#!/usr/bin/env bash
# Put the page with its runtime and a model into a folder that any web server can serve, without further downloads:
#
#   docs/web/build.sh MODEL-AUDIO.onnx FOLDER      # tokens.txt is taken from beside the model; needs npm
#   python -m http.server --directory FOLDER       # then open http://localhost:8000
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: docs/web/build.sh MODEL-AUDIO.onnx FOLDER" >&2
  exit 1
fi
here=$(cd "$(dirname "$0")" && pwd)
model=$(realpath "$1")
mkdir -p "$2/ort" "$2/model"
cp "$here/index.html" "$here/recognise.js" "$2/"
cp "$model" "$2/model/model.onnx"
cp "$(dirname "$model")/tokens.txt" "$2/model/"
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
npm install --silent --no-save --prefix "$packages" onnxruntime-web@1.30.0
for file in ort.wasm.min.js ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm; do
  cp "$packages/node_modules/onnxruntime-web/dist/$file" "$2/ort/"
done
echo "wrote $2"
