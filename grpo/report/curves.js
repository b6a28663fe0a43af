// What the charts draw: which metrics in which section, points, smoothing, thinning, ticks.

const SECTIONS = [
  ["Reward", ["reward", "rewards/*", "reward_std"]],
  ["Validation", ["valid/f1", "valid/*"]],
  ["Policy", ["kl", "entropy", "ratio_mean", "clip_ratio/*"]],
  ["Completions", ["completions/*"]],
  ["Groups and curriculum", ["frac_reward_zero_std", "curriculum/*", "groups_dropped", "prompts", "prompts_too_long"]],
  ["Optimisation", ["loss", "grad_norm", "learning_rate", "num_tokens"]],
  ["Seconds", ["step_time", "seconds/*"]],
  ["Others", ["*"]],
];

const NAMES = {
  reward: "Reward",
  reward_std: "Spread in a group",
  kl: "KL to the reference",
  entropy: "Entropy",
  ratio_mean: "Ratio, mean",
  "clip_ratio/low_mean": "Clipped below",
  "clip_ratio/high_mean": "Clipped above",
  "clip_ratio/region_mean": "Clipped, both",
  "completions/mean_length": "Length, mean",
  "completions/max_length": "Length, longest",
  "completions/clipped_ratio": "Cut by the limit",
  frac_reward_zero_std: "Zero-variance groups",
  "curriculum/easy_per_hard": "Curriculum, easy : hard",
  groups_dropped: "Groups dropped",
  prompts: "Prompts",
  prompts_too_long: "Prompts too long",
  loss: "Loss",
  grad_norm: "Gradient norm",
  learning_rate: "Learning rate",
  num_tokens: "Tokens",
  step_time: "A step",
  "valid/f1": "F1",
};

const HEIGHT = 150,
  LEFT = 46,
  RIGHT = 10,
  TOP = 10,
  BOTTOM = 22,
  DOTS = 30;

function title(metric) {
  if (NAMES[metric]) return NAMES[metric];
  const words = metric
    .replace(/^(rewards|valid|seconds|completions)\//, "")
    .replace(/\/mean$/, "")
    .replace(/_/g, " ");
  return words[0].toUpperCase() + words.slice(1);
}

// Each metric in the first section that names it.
function sectionsOf(runs) {
  const left = new Set(runs.flatMap((run) => Object.keys(run.columns)));
  left.delete("step");
  left.delete("epoch");
  return SECTIONS.map(([name, patterns]) => {
    const metrics = patterns.flatMap((pattern) => {
      const fits = (metric) => (pattern.endsWith("*") ? metric.startsWith(pattern.slice(0, -1)) : metric === pattern);
      const found = [...left].filter(fits);
      found.forEach((metric) => left.delete(metric));
      return found;
    });
    return [name, metrics];
  }).filter(([, metrics]) => metrics.length);
}

// What never changes is a sentence and no chart.
function constant(runs, metric) {
  const values = runs.flatMap((run) => known(run.columns[metric]));
  return values.length > 1 && values.every((value) => value === values[0]) ? values[0] : null;
}

// [[step, value], …] without what is not there; kept until the run grows.
function pointsOf(run, metric) {
  const steps = run.columns.step,
    values = run.columns[metric];
  if (!values) return [];
  run.points ??= {};
  if (run.points[metric]?.length !== values.length)
    run.points[metric] = {
      length: values.length,
      points: steps.map((step, i) => [step, values[i]]).filter((point) => point[1] !== null),
    };
  return run.points[metric].points;
}

// An exponential mean that starts without a pull to zero, over a share of the run that the slider sets: at most a
// tenth. Few points are shown as they are.
function smooth(points, slider) {
  if (!slider || points.length < DOTS) return points;
  const weight = 1 - 1 / (1 + (slider ** 2 * points.length) / 10);
  let mean = 0,
    mass = 0;
  return points.map(([step, value]) => {
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return [step, mean / mass];
  });
}

// More points than pixels: in every pixel column only the first, the lowest, the highest and the last are drawn.
function thin(places, width) {
  if (places.length <= 2 * width) return places;
  const columns = new Map();
  for (const place of places) {
    const at = Math.floor(place[0]),
      column = columns.get(at);
    if (!column) columns.set(at, { first: place, low: place, high: place, last: place });
    else {
      if (place[1] < column.low[1]) column.low = place;
      if (place[1] > column.high[1]) column.high = place;
      column.last = place;
    }
  }
  return [...columns.values()].flatMap(({ first, low, high, last }) =>
    [...new Set([first, low, high, last])].sort((a, b) => a[0] - b[0]),
  );
}

// About `count` round numbers between low and high.
function ticks(low, high, count) {
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough * 0.99);
  const first = Math.ceil(low / step - 1e-9),
    found = [];
  for (let i = first; i * step <= high + step * 1e-9; i++) found.push(i * step || 0); // no −0
  return found;
}

// The digits that tell ticks apart, and no more.
function tickText(value, step) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e5 || step < 1e-4)
    return value
      .toExponential(step < Math.abs(value) * 0.99 ? 1 : 0)
      .replace("e+", "e")
      .replace(/-/g, "−");
  return value.toFixed(Math.max(0, Math.ceil(-Math.log10(step) - 1e-9))).replace("-", "−");
}

function range(values) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === Infinity) return [0, 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}
