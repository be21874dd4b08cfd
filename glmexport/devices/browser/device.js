// The device program of a browser: answers a job (job.py has its form) with onnxruntime-web.
//
// One file for two places. The page starts it again as a worker, where it may block and the page stays alive, and
// shows what the worker says. All that is read comes from the folder that this file is served from, and all that is
// found out is posted there: answers as files, everything else as events.

const HERE = new URL(".", import.meta.url);
// As in program.py: positions that a cache of fixed capacity grows by, and those of a prompt computed together.
const GROWTH = 256, CHUNK = 256;
const ELEMENT = {F32: Float32Array, I32: Int32Array};
const CACHED = {float32: Float32Array, float16: Uint16Array, int8: Int8Array, uint8: Uint8Array};
// As long as what it says does not change: the smallest module with an instruction of SIMD, and of relaxed SIMD.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
const RELAXED = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0, 65, 1, 253, 15, 65, 2, 253, 15,
  253, 128, 2, 11,
];

async function reach(path, options) {
  const response = await fetch(new URL(path, HERE), options);
  if (!response.ok) throw new Error(await response.text());
  return response;
}

const post = (path, body) => reach(path, {method: "POST", body});
const tell = (kind, facts) => post("event", JSON.stringify({kind, ...facts}));

// What is being done, for when it fails: a kind for programs, and words.
let doing = {stage: "start", words: "starting"};
const now = (stage, words) => { doing = {stage, words}; };

// A file of the job, if it is the one that job.json lists.
async function verified({path, size, sha256}) {
  now("files", `reading ${path}`);
  const bytes = new Uint8Array(await (await reach(`job/${path}`)).arrayBuffer());
  if (bytes.length !== size || await digest(bytes) !== sha256) {
    throw new Error(`${path} is not the file that job.json lists (its sha256 differs).`);
  }
  return bytes;
}

async function digest(bytes) {
  const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(sum, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// safetensors: a 64-bit length, that much JSON, and the tensors' bytes. https://github.com/huggingface/safetensors
function readTensors(bytes) {
  const start = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  return (name) => {
    const entry = header[name];
    if (!entry) return null;
    const [from, to] = entry.data_offsets;
    return {shape: entry.shape, data: new ELEMENT[entry.dtype](bytes.slice(start + from, start + to).buffer)};
  };
}

function writeTensors(tensors) {
  const header = {};
  let offset = 0;
  for (const [name, {shape, data}] of Object.entries(tensors)) {
    const dtype = Object.keys(ELEMENT).find((each) => data instanceof ELEMENT[each]);
    header[name] = {dtype, shape, data_offsets: [offset, offset + data.byteLength]};
    offset += data.byteLength;
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(json.length / 8) * 8).fill(32);
  padded.set(json);
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(padded.length), true);
  return new Blob([length, padded, ...Object.values(tensors).map(({data}) => data)]);
}

// The token with the greatest of a row of logits; of equal ones the lowest. As in numpy, one that is no number wins.
function greatest(row) {
  let top = 0;
  for (let token = 1; token < row.length; token++) {
    if (!(row[token] <= row[top]) && !Number.isNaN(row[top])) top = token;
  }
  return top;
}

// What is kept of logits [length, vocabulary] of the text's judged positions, the first of which is `first`: those of
// `tokens`, the target's, the most likely token, and the logarithm of the exponentials' sum over all other tokens, fp64.
function reduced(logits, vocabulary, first, {tokens, targets, audit}) {
  const positions = targets.data.length, kept = tokens.shape[1];
  const found = {
    logits: {shape: tokens.shape, data: new Float32Array(positions * kept)},
    log_others: {shape: [positions], data: new Float32Array(positions).fill(-Infinity)},
    target: {shape: [positions], data: new Float32Array(positions)},
    top: {shape: [positions], data: new Int32Array(positions)},
  };
  for (let at = 0; at < positions; at++) {
    const row = logits.subarray((first + at) * vocabulary, (first + at + 1) * vocabulary);
    const own = tokens.data.subarray(at * kept, (at + 1) * kept);
    found.top.data[at] = greatest(row);
    found.target.data[at] = row[targets.data[at]];
    own.forEach((token, rank) => { found.logits.data[at * kept + rank] = row[token]; });
    if (kept < vocabulary) {
      const others = row.slice();
      for (const token of own) others[token] = -Infinity;
      const most = others[greatest(others)];
      let sum = 0;
      for (let token = 0; token < vocabulary; token++) sum += Math.exp(others[token] - most);
      found.log_others.data[at] = most + Math.log(sum);
    }
  }
  if (audit) {
    const whole = new Float32Array(audit.data.length * vocabulary);
    audit.data.forEach((at, index) => {
      const start = (first + at) * vocabulary;
      whole.set(logits.subarray(start, start + vocabulary), index * vocabulary);
    });
    found.audit = {shape: [audit.data.length, vocabulary], data: whole};
  }
  return found;
}

class Device {
  constructor(ort, settings, job) {
    Object.assign(this, {ort, settings, job, graphs: job.graphs, gpu: settings.provider === "webgpu"});
  }

  // A graph with its weights, which are in memory twice only until the session is open.
  async open(path, options = {}) {
    const folder = path.slice(0, path.lastIndexOf("/") + 1);
    const shards = this.job.files.filter((each) => each.path.startsWith(folder) && !each.path.endsWith(".onnx"));
    const graph = await verified(this.job.files.find((each) => each.path === path));
    const externalData = [];
    for (const each of shards) externalData.push({path: each.path.slice(folder.length), data: await verified(each)});
    now("graph", `opening ${path}`);
    const started = performance.now();
    const session = await this.ort.InferenceSession.create(graph, {
      executionProviders: [{name: this.settings.provider, ...this.job.provider.options}], externalData,
      logSeverityLevel: 3, ...options,
    });
    this.loadSeconds = (performance.now() - started) / 1000;
    return session;
  }

  // The generation graph, whose caches stay with the adapter where there is one.
  openGeneration(options) {
    const outputs = Object.fromEntries(this.graphs.caches.map(({output}) => [output, "gpu-buffer"]));
    return this.open(this.graphs.generation, this.gpu ? {preferredOutputLocation: outputs, ...options} : options);
  }

  integers(values, shape) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }

  cache({shape, dtype}, capacity, former) {
    const sizes = {batch: 1, past_sequence: 0, capacity};
    const full = shape.map((size) => sizes[size] ?? size);
    const count = full.reduce((product, size) => product * size, 1);
    const data = new CACHED[dtype](count);
    if (former) data.set(former);
    return new this.ort.Tensor(dtype, data, full);
  }

  feeds(ids, length) {
    const {input_ids, attention_mask} = this.graphs;
    return {
      [input_ids]: this.integers(ids, [1, ids.length]),
      [attention_mask]: this.integers(new Uint8Array(length).fill(1), [1, length]),
    };
  }

  // Logits [length, vocabulary] behind each of `ids`, from an empty cache.
  async scores(session, ids) {
    const feeds = this.feeds(ids, ids.length);
    for (const each of this.graphs.caches) feeds[each.input] = this.cache(each, ids.length);
    return values((await session.run(feeds, [this.graphs.logits]))[this.graphs.logits]);
  }

  // The most likely token again and again, each added to the sequence that begins with `prompt`.
  async* stream(session, prompt) {
    const {caches, cache_kind, logits} = this.graphs;
    const fixed = cache_kind === "capacity";
    let pasts = {}, length = 0, capacity = 0, fresh = prompt;
    try {
      while (true) {
        const step = fixed ? CHUNK : fresh.length;
        let scores;
        for (let start = 0; start < fresh.length; start += step) {
          const ids = fresh.slice(start, start + step);
          length += ids.length;
          if (length > capacity && (fixed || !capacity)) {
            capacity = Math.min(Math.ceil(length / GROWTH) * GROWTH, this.job.context_length);
            const grown = {};
            for (const each of caches) {
              grown[each.input] = this.cache(each, capacity, await pasts[each.input]?.getData());
            }
            release(pasts);
            pasts = grown;
          }
          const outputs = await session.run({...this.feeds(ids, length), ...pasts});
          release(pasts);
          pasts = Object.fromEntries(caches.map(({input, output}) => [input, outputs[output]]));
          scores = values(outputs[logits]);
        }
        const token = greatest(scores.subarray(-this.job.vocabulary_size));
        fresh = [token];
        yield token;
      }
    } finally {
      release(pasts);
    }
  }

  async texts(questions, left) {
    const session = await this.open(this.graphs.scoring);
    for (const index of left) {
      now("run", `computing text ${index}`);
      const question = (name) => questions(`text.${index}.${name}`);
      const logits = await this.scores(session, question("ids").data);
      const asked = {tokens: question("tokens"), targets: question("targets"), audit: question("audit")};
      const kept = reduced(logits, this.job.vocabulary_size, this.job.texts[index] - 1, asked);
      await post(`result/answers/${index}.safetensors`, writeTensors(kept));
    }
    await session.release();
  }

  async prompts(questions, left) {
    heard = [];
    const session = await this.openGeneration({logSeverityLevel: 0});
    await tell("placement", {lines: heard.filter((line) => /VerifyEachNodeIsAssignedToAnEp/.test(line))});
    heard = null;
    for (const index of left) {
      now("run", `answering prompt ${index}`);
      const prompt = Array.from(questions(`prompt.${index}.ids`).data);
      const count = Math.min(this.job.prompts[index], this.job.context_length - prompt.length);
      const answer = [];
      for await (const token of this.stream(session, prompt)) {
        answer.push(token);
        if (this.job.end_tokens.includes(token) || answer.length >= count) break;
      }
      const tokens = {shape: [answer.length], data: Int32Array.from(answer)};
      await post(`result/tokens/${index}.safetensors`, writeTensors({tokens}));
    }
    await session.release();
  }

  async speed({prompt, generated_tokens, rounds, seconds}) {
    const session = await this.openGeneration();
    now("run", "measuring speed");
    const found = [], start = performance.now();
    // The first one does not count.
    for (let round = -1; round < rounds || performance.now() - start < 1000 * seconds; round++) {
      const times = [performance.now()];
      for await (const _ of this.stream(session, prompt)) {
        if (times.push(performance.now()) > generated_tokens) break;
      }
      const [first, ...steps] = times.slice(1).map((time, index) => (time - times[index]) / 1000);
      if (round < 0) continue;
      found.push({ttft_s: first, steps_s: steps});
      await tell("round");
    }
    await tell("speed", {load_s: this.loadSeconds, threads: this.ort.env.wasm.numThreads, rounds: found});
    await session.release();
  }
}

// fp32 of a tensor that came back to the processor.
const values = ({type, data}) => (type === "float16" ? Float32Array.from(data) : data);

const release = (tensors) => Object.values(tensors).forEach((each) => each.location === "gpu-buffer" && each.dispose());

// The lines that ONNX Runtime prints, which it does nowhere but here: kept while something listens.
let heard = null;

async function work() {
  for (const kind of ["log", "info", "warn", "error", "debug"]) {
    console[kind] = (...words) => heard?.push(...words.join(" ").split("\n"));
  }
  const settings = await (await reach("settings.json")).json();
  const text = new Uint8Array(await (await reach("job/job.json")).arrayBuffer());
  if (await digest(text) !== settings.job_digest) throw new Error("job.json changed since this device was started.");
  const job = JSON.parse(new TextDecoder().decode(text));
  now("runtime", `loading ${settings.runtime}`);
  const ort = await import(new URL(`runtime/${settings.runtime}`, HERE));
  const threads = job.threads ?? navigator.hardwareConcurrency;
  if (threads > 1 && !self.crossOriginIsolated) {
    throw new Error(`${threads} threads need a page that is isolated from other origins, and this one is not.`);
  }
  ort.env.wasm.numThreads = threads;
  const facts = {
    user_agent: navigator.userAgent, cores: navigator.hardwareConcurrency, memory_gib: navigator.deviceMemory ?? null,
    isolated: self.crossOriginIsolated, threads, runtime: ort.env.versions.web,
    simd: WebAssembly.validate(Uint8Array.from(SIMD)), relaxed_simd: WebAssembly.validate(Uint8Array.from(RELAXED)),
    adapter: settings.provider === "webgpu" ? await adapter(settings) : null,
  };
  // Told what this device is, glmexport tells what is left to do.
  const left = await (await tell("facts", facts)).json();
  const device = new Device(ort, settings, job);
  if (left.speed) await device.speed(job.speed);
  if (left.prompts.length || left.texts.length) {
    const questions = readTensors(await verified(job.files.find(({path}) => path === "questions.safetensors")));
    if (left.prompts.length) await device.prompts(questions, left.prompts);
    if (left.texts.length) await device.texts(questions, left.texts);
  }
  await tell("finished");
}

// What WebGPU computes on, if it holds the largest tensor.
async function adapter({largest_tensor}) {
  now("adapter", "looking for a WebGPU adapter");
  if (!navigator.gpu) throw new Error("This browser has no WebGPU (navigator.gpu).");
  const found = await navigator.gpu.requestAdapter({powerPreference: "high-performance"});
  if (!found) throw new Error("There is no WebGPU adapter: requestAdapter() gave none.");
  const {info, limits} = found;
  const room = Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize);
  if (room < largest_tensor) {
    throw new Error(`The largest tensor has ${largest_tensor} bytes, and a buffer of this adapter at most ${room}.`);
  }
  return {
    vendor: info.vendor, architecture: info.architecture, device: info.device, description: info.description,
    fallback: Boolean(info.isFallbackAdapter), buffer_bytes: room, half: found.features.has("shader-f16"),
  };
}

if (typeof document === "undefined") {
  work().catch((error) => tell("failed", {...doing, reason: String(error?.message ?? error)}));
} else {
  const worker = new Worker(import.meta.url, {type: "module"});
  // Of a script that cannot even be started: nothing in it could tell.
  worker.onerror = (event) => tell("failed", {...doing, reason: event.message ?? "the worker"});
}
