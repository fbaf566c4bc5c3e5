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
# The archive alone: all of the runtime is in it, and its dependencies are for other uses.
if ! npm pack --silent --prefer-offline --pack-destination "$packages" onnxruntime-web@1.30.0 > /dev/null; then
  echo "docs/web/build.sh: npm cannot fetch onnxruntime-web; is npm installed, and the network there?" >&2
  exit 3
fi
tar -xzf "$packages"/onnxruntime-web-*.tgz -C "$2/ort" --strip-components=2 \
  package/dist/{ort.wasm.min.js,ort-wasm-simd-threaded.mjs,ort-wasm-simd-threaded.wasm}
echo "wrote $2"
