// Speech to IPA phones in the browser: audio of a file or the microphone -> model-audio.onnx -> best path.

const RATE = 16000; // Hz, what the model hears
const SHORTEST = 1360; // samples, 9 feature frames
const BLANK = 0;
const BOUNDARY = "▁";
// What browsers do for telephone calls takes sounds away.
const UNCHANGED = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };

const element = (id) => document.getElementById(id);
const say = (text, failed = false) => {
  element("status").textContent = text;
  element("status").classList.toggle("failed", failed);
};
const fail = (error) => say(`Failed: ${error.message}`, true);

async function load() {
  ort.env.wasm.wasmPaths = new URL("ort/", document.baseURI).href;
  const lines = (await fetchOrThrow("model/tokens.txt").then((r) => r.text())).trim().split("\n");
  const pieces = lines.map((line) => line.split(" ")[0]);
  const bytes = await fetchOrThrow("model/model.onnx").then((r) => r.arrayBuffer());
  return { session: await ort.InferenceSession.create(bytes), pieces };
}

async function fetchOrThrow(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}; run docs/web/build.sh first`);
  return response;
}

// Any audio that the browser decodes, to mono samples at 16 kHz.
async function decodeAudio(buffer) {
  const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(buffer); // resamples too
  const mono = new Float32Array(decoded.length);
  for (let c = 0; c < decoded.numberOfChannels; c++) {
    decoded.getChannelData(c).forEach((value, i) => { mono[i] += value / decoded.numberOfChannels; });
  }
  return mono;
}

async function recognise({ session, pieces }, samples) {
  if (samples.length < SHORTEST) throw new Error("too short: the model needs 0.085 s at least");
  const audio = new ort.Tensor("float32", samples, [1, samples.length]);
  const lengths = new ort.Tensor("int64", BigInt64Array.from([BigInt(samples.length)]), [1]);
  const { log_probs } = await session.run({ audio, audio_lens: lengths });
  return bestPath(log_probs.data, log_probs.dims[2]).map((id) => pieces[id]).filter((piece) => piece !== BOUNDARY);
}

// The best id of each frame, repeats merged and blanks dropped.
function bestPath(logProbs, size) {
  const ids = [];
  let previous = BLANK;
  for (let start = 0; start < logProbs.length; start += size) {
    const frame = logProbs.subarray(start, start + size);
    const best = frame.reduce((top, value, id) => (value > frame[top] ? id : top), 0);
    if (best !== BLANK && best !== previous) ids.push(best);
    previous = best;
  }
  return ids;
}

// Spaces between phones, but none before marks and modifier letters, which belong to the phone before.
function joinMarks(phones) {
  return phones.join(" ").replace(/ ([\p{Mn}\p{Lm}\p{Sk}])/gu, "$1");
}

async function transcribe(model, blob) {
  element("player").src = URL.createObjectURL(blob);
  element("player").hidden = false;
  element("phones").textContent = "";
  say("Listening …");
  try {
    const samples = await decodeAudio(await blob.arrayBuffer());
    const started = performance.now();
    const phones = await recognise(model, samples);
    const seconds = (performance.now() - started) / 1000;
    element("phones").textContent = joinMarks(phones) || "–";
    say(`${(samples.length / RATE).toFixed(1)} s of audio in ${seconds.toFixed(2)} s`);
  } catch (error) {
    fail(error);
  }
}

function showRecording(on) {
  element("record").textContent = on ? "Stop" : "Record";
  element("record").classList.toggle("on", on);
}

async function toggleRecording(model, state) {
  if (state.recorder) {
    state.recorder.stop();
    return;
  }
  const stream = await navigator.mediaDevices.getUserMedia({ audio: UNCHANGED });
  const parts = [];
  const recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    stream.getTracks().forEach((track) => track.stop());
    state.recorder = null;
    showRecording(false);
    transcribe(model, new Blob(parts, { type: recorder.mimeType }));
  };
  recorder.start();
  state.recorder = recorder;
  showRecording(true);
  say("Recording …");
}

try {
  const model = await load();
  const state = { recorder: null };
  element("file").onchange = (event) => event.target.files[0] && transcribe(model, event.target.files[0]);
  element("record").onclick = () => toggleRecording(model, state).catch(fail);
  element("file").disabled = element("record").disabled = false;
  say("Ready.");
} catch (error) {
  fail(error);
}
