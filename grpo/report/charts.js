// Curves: one small chart a metric, the runs on top of each other, one cursor through all of them.

class Chart {
  constructor(metric, runs) {
    this.metric = metric;
    this.runs = runs;
    this.values = element("span", { class: "values" });
    this.plot = drawing("svg", { height: HEIGHT, "aria-hidden": "true" });
    this.frame = element(
      "div",
      {
        class: "plot",
        tabindex: 0,
        role: "slider",
        "aria-label": `${title(metric)}, by step`,
        onpointermove: (event) => setCursor(this.stepAt(event)),
        onpointerdown: (event) => setCursor(this.stepAt(event)),
        onpointerleave: (event) => event.pointerType === "mouse" && setCursor(null),
        onkeydown: (event) => this.key(event),
      },
      this.plot,
    );
    this.figure = element(
      "figure",
      { class: "chart", "data-metric": metric },
      element("figcaption", {}, element("span", { class: "name", title: metric }, title(metric)), this.values),
      this.frame,
    );
  }

  shown() {
    return this.runs.filter((run) => !state.hidden.has(run.name) && pointsOf(run, this.metric).length);
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width) return;
    this.width = width;
    const curves = this.shown().map((run) => ({
      run,
      raw: pointsOf(run, this.metric),
      line: smooth(pointsOf(run, this.metric), state.smoothing),
    }));
    const steps = this.runs.flatMap((run) => [run.columns.step[0], run.columns.step.at(-1)]);
    this.first = Math.min(...steps);
    this.end = Math.max(...steps, this.first + 1);
    [this.low, this.high] = range(curves.flatMap(({ raw }) => raw.map((point) => point[1])));
    this.plot.setAttribute("width", width);
    this.cursor = drawing("g", { class: "cursor" });
    this.plot.replaceChildren(...this.grid(), ...curves.flatMap((curve) => this.curve(curve)), this.cursor);
    this.frame.setAttribute("aria-valuemin", this.first);
    this.frame.setAttribute("aria-valuemax", this.end);
    this.point();
  }

  x(step) {
    return LEFT + ((step - this.first) / (this.end - this.first)) * (this.width - LEFT - RIGHT);
  }
  y(value) {
    return TOP + (1 - (value - this.low) / (this.high - this.low)) * (HEIGHT - TOP - BOTTOM);
  }

  grid() {
    const across = ticks(this.low, this.high, 4),
      along = ticks(this.first, this.end, Math.max(3, Math.floor(this.width / 75)));
    const step = across[1] - across[0] || Math.abs(across[0]) || 1;
    return [
      ...across.flatMap((value) => [
        drawing("line", { class: "rule", x1: LEFT, x2: this.width - RIGHT, y1: this.y(value), y2: this.y(value) }),
        drawing(
          "text",
          { class: "tick", x: LEFT - 6, y: this.y(value) + 3.5, "text-anchor": "end" },
          tickText(value, step),
        ),
      ]),
      ...along
        .filter(Number.isInteger)
        .map((value) =>
          drawing(
            "text",
            { class: "tick", x: Math.min(this.x(value), this.width - 16), y: HEIGHT - 5, "text-anchor": "middle" },
            value.toLocaleString("en"),
          ),
        ),
    ];
  }

  curve({ run, raw, line }) {
    const path = (points, kind) => {
      const places = thin(
        points.map(([step, value]) => [this.x(step), this.y(value)]),
        this.width,
      );
      const d = "M" + places.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
      return drawing("path", {
        class: kind,
        d,
        stroke: colour(run),
        "stroke-dasharray": dash(run),
        "data-run": run.name,
        "data-points": points.length,
        "data-drawn": places.length,
      });
    };
    const dots =
      raw.length < DOTS
        ? raw.map(([step, value]) =>
            drawing("circle", { cx: this.x(step), cy: this.y(value), r: 2.2, fill: colour(run) }),
          )
        : [];
    return [line === raw ? null : path(raw, "raw"), path(line, "line"), ...dots].filter(Boolean);
  }

  // The cursor's line, and beside the title the values under it, or else the last ones.
  point() {
    const runs = this.shown(),
      at = state.cursor;
    const found = runs.map((run) => [
      run,
      at === null ? pointsOf(run, this.metric).at(-1) : nearest(pointsOf(run, this.metric), at),
    ]);
    this.values.replaceChildren(
      ...found.map(([run, place]) =>
        element("span", { class: "value", style: `--run:${colour(run)}` }, short(place[1])),
      ),
    );
    const text = found.map(([run, place]) => `${runs.length > 1 ? run.name + " " : ""}${short(place[1])}`).join(", ");
    this.frame.setAttribute("aria-valuenow", at ?? this.end);
    this.frame.setAttribute("aria-valuetext", `step ${at ?? this.end}: ${text}`);
    if (at === null || at < this.first || at > this.end) return this.cursor?.replaceChildren();
    const x = this.x(at),
      beside = x > this.width - 60 ? "end" : "start";
    this.cursor.replaceChildren(
      drawing("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
      drawing(
        "text",
        { class: "tick", x: x + (beside === "end" ? -5 : 5), y: TOP + 8, "text-anchor": beside },
        `step ${at.toLocaleString("en")}`,
      ),
      ...found.map(([run, [step, value]]) =>
        drawing("circle", { cx: this.x(step), cy: this.y(value), r: 3.5, fill: colour(run) }),
      ),
    );
  }

  steps() {
    return [...new Set(this.shown().flatMap((run) => run.columns.step))].sort((a, b) => a - b);
  }

  stepAt(event) {
    const x = event.clientX - this.frame.getBoundingClientRect().left;
    const step = this.first + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (this.end - this.first);
    const steps = this.steps().map((value) => [value]);
    return steps.length ? nearest(steps, step)[0] : null;
  }

  key(event) {
    const steps = this.steps();
    const end = steps.length - 1;
    const by = {
      ArrowLeft: -1,
      ArrowDown: -1,
      ArrowRight: 1,
      ArrowUp: 1,
      PageDown: -10,
      PageUp: 10,
      Home: -Infinity,
      End: Infinity,
    }[event.key];
    if (event.key === "Escape") return setCursor(null);
    if (by === undefined || !steps.length) return;
    event.preventDefault();
    event.stopPropagation();
    if (state.cursor === null && Number.isFinite(by)) return setCursor(steps[end]);
    const i =
      state.cursor === null
        ? end
        : steps.indexOf(
            nearest(
              steps.map((step) => [step]),
              state.cursor,
            )[0],
          );
    setCursor(steps[Math.min(Math.max(i + by, 0), end)]);
  }
}

// The point whose step is nearest, by halving.
function nearest(points, step) {
  let low = 0,
    high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(points[high][0] - step) < Math.abs(points[low][0] - step) ? points[high] : points[low];
}

let charts = [],
  asked = false;

function setCursor(step) {
  if (step === state.cursor) return;
  state.cursor = step;
  if (asked) return;
  asked = true; // many movements, one drawing a frame
  requestAnimationFrame(() => {
    asked = false;
    charts.forEach((chart) => chart.point());
  });
}

function drawCharts() {
  charts.forEach((chart) => chart.draw());
}

function panel(name, metrics, runs) {
  const still = metrics.map((metric) => [metric, constant(runs, metric)]).filter(([, value]) => value !== null);
  const moving = metrics
    .filter((metric) => !still.some(([same]) => same === metric))
    .map((metric) => new Chart(metric, runs));
  charts.push(...moving);
  const sentence = still.map(([metric, value]) => `${title(metric)} ${short(value)}`).join(" · ");
  return element(
    "div",
    { class: "panel" },
    element("h4", {}, name),
    moving.length
      ? element(
          "div",
          { class: "charts" },
          moving.map((chart) => chart.figure),
        )
      : null,
    sentence ? element("p", { class: "constant" }, `Constant: ${sentence}`) : null,
  );
}

function buildCharts() {
  charts = [];
  const kinds = [
    ["GRPO", "Stage 2 · GRPO"],
    ["SFT", "Stage 1 · supervised"],
  ]
    .map(([kind, heading]) => [heading, training().filter((run) => run.kind === kind)])
    .filter(([, runs]) => runs.length);
  const parts = kinds.map(([heading, runs]) =>
    element(
      "div",
      { class: "kind" },
      kinds.length > 1 ? element("h3", {}, heading) : null,
      sectionsOf(runs).map(([name, metrics]) => panel(name, metrics, runs)),
    ),
  );
  byId("panels").replaceChildren(...(parts.length ? parts : [element("p", { class: "nothing" }, "No metrics yet.")]));
  drawCharts();
}

function buildLegend() {
  byId("legend").replaceChildren(
    ...training().map((run) =>
      element(
        "button",
        {
          type: "button",
          class: "run",
          style: `--run:${colour(run)}`,
          "aria-pressed": String(!state.hidden.has(run.name)),
          onclick: (event) => {
            const shown = state.hidden.delete(run.name);
            if (!shown) state.hidden.add(run.name);
            event.currentTarget.setAttribute("aria-pressed", String(shown));
            drawCharts();
          },
        },
        element("span", { class: "swatch", "aria-hidden": "true" }),
        run.name,
      ),
    ),
  );
}
