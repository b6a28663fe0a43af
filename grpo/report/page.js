// The page as a whole: overview, tables, and what --live brings.

const PROVENANCE = [
  ["kind", "program"],
  ["folder", "folder"],
  ["started", "started"],
  ["ranks", "ranks"],
  ["commit", "commit"],
  ["data_hash", "hash of data"],
  ["model_hash", "hash of model"],
];

// The means of the first and the last tenth: single updates are noise.
function tenths(values) {
  const size = Math.ceil(values.length / 10);
  return values.length ? `${short(mean(values.slice(0, size)))} → ${short(mean(values.slice(-size)))}` : "–";
}

function runCard(run) {
  const { columns, best } = run,
    key = run.kind === "SFT" ? "loss" : "reward",
    values = known(columns[key]);
  const metric = run.settings?.valid_metric || "f1",
    valid = best.valid?.[metric],
    seconds = sum(known(columns.step_time));
  const facts = [
    [`${title(key)}, first → last tenth`, tenths(values)],
    [
      `Best ${metric.toUpperCase()} in validation`,
      valid === undefined ? null : `${short(valid)} at step ${best.step}`,
    ],
    [run.kind === "SFT" ? "Updates" : "Rollouts", `${known(columns.step).at(-1) ?? 0} in ${duration(seconds)}`],
  ].filter(([, value]) => value !== null);
  const line = ["commit", "data_hash", "model_hash"]
    .filter((name) => run[name])
    .map(
      (name) =>
        `${name.replace("_hash", "")} ` +
        (name === "commit" ? run[name].replace(/^(.{9})[^+]*/, "$1") : run[name].slice(0, 8)),
    );
  return element(
    "article",
    { class: "run-card", style: `--run:${colour(run)}` },
    element(
      "h3",
      {},
      element("span", { class: "swatch", "aria-hidden": "true" }),
      run.name,
      " ",
      element("span", { class: "badge" }, run.kind),
    ),
    element(
      "dl",
      {},
      facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    ),
    element(
      "p",
      { class: "small" },
      [run.started, ...Object.entries(run.versions || {}).map((pair) => pair.join(" ")), ...line]
        .filter(Boolean)
        .join(" · "),
    ),
    run.warnings.map((warning) => element("p", { class: "warning" }, warning)),
  );
}

// One table for each split of each dataset: figures of other samples are not to be compared.
function evaluations() {
  const tables = new Map();
  for (const run of DATA.runs.filter((run) => Object.keys(run.evaluation).length)) {
    const of = ["task", "split", "exclude", "limit"].map((name) => run.settings?.[name]);
    const samples = JSON.stringify([run.data_hash, ...of]);
    tables.set(samples, [...(tables.get(samples) || []), run]);
  }
  return [...tables.values()].flatMap(evaluationTable);
}

function evaluationTable(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.evaluation)))];
  const best = Object.fromEntries(
    names.map((name) => [name, Math.max(...runs.map((run) => run.evaluation[name] ?? -Infinity))]),
  );
  const counts = new Set(["samples", "seconds", "unparsable"]);
  const { split, limit } = runs[0].settings || {},
    heading = split ? `Evaluations: ${split}${limit ? `, the first ${limit}` : ""}` : "Evaluations";
  const bestClass = (run, name) =>
    runs.length > 1 && !counts.has(name) && run.evaluation[name] === best[name] ? "best" : null;
  const heads = names.map((name) => element("th", { scope: "col" }, name.replace(/_/g, " ")));
  const row = (run) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, run.name),
      names.map((name) => element("td", { class: bestClass(run, name) }, short(run.evaluation[name]))),
    );
  return [
    element("h2", {}, heading),
    scroller(
      heading,
      element(
        "table",
        { class: "evaluations" },
        element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "run"), heads)),
        element("tbody", {}, runs.map(row)),
      ),
    ),
  ];
}

const scroller = (label, table) =>
  element("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": label }, table);

// One run by its name, several by the folder that they share.
function pageTitle() {
  if (DATA.runs.length === 1) return DATA.runs[0].name;
  const folders = DATA.runs.map((run) => run.folder.split("/")),
    first = folders[0];
  const shared = first
    .slice(0, -1)
    .findLast((part, i, parts) =>
      folders.every((folder) => parts.slice(0, i + 1).every((same, k) => folder[k] === same)),
    );
  return shared || `${DATA.runs[0].name} and ${DATA.runs.length - 1} more`;
}

function buildOverview() {
  byId("title").textContent = pageTitle();
  byId("overview").replaceChildren(element("div", { class: "run-cards" }, training().map(runCard)), ...evaluations());
  byId("made").textContent = `Made ${DATA.made} by python -m grpo.report.`;
}

// ── settings ───────────────────────────────────────────────────────────────────────────────────────────────────

let onlyDifferent = DATA.runs.length > 1;

function settingRows() {
  const rows = PROVENANCE.map(([name, words]) => [words, DATA.runs.map((run) => run[name] ?? undefined)]);
  const names = (part) => [...new Set(DATA.runs.flatMap((run) => Object.keys(run[part] || {})))];
  for (const name of names("versions")) rows.push([name, DATA.runs.map((run) => run.versions?.[name])]);
  for (const name of names("settings")) rows.push([name, DATA.runs.map((run) => run.settings?.[name])]);
  return rows
    .map(([name, values]) => {
      const texts = values.map((value) =>
        value === undefined ? null : value === null ? "objective's own" : value === "" ? "“”" : String(value),
      );
      const given = texts.filter((text) => text !== null);
      return { name, texts, differs: given.some((text) => text !== given[0]) };
    })
    .filter(({ texts }) => texts.some((text) => text !== null));
}

function buildSettings() {
  const rows = settingRows(),
    different = rows.filter((row) => row.differs);
  const shown = onlyDifferent ? different : rows,
    many = DATA.runs.length > 1;
  const box = element("input", {
    type: "checkbox",
    onchange: (event) => {
      onlyDifferent = event.target.checked;
      buildSettings();
    },
  });
  box.checked = onlyDifferent;
  byId("what-ran").replaceChildren(
    many
      ? element(
          "div",
          { class: "toolbar" },
          element("label", {}, box, ` only what differs (${different.length} of ${rows.length})`),
        )
      : "",
    scroller(
      "Settings",
      element(
        "table",
        { class: "settings" },
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            element("th", { scope: "col" }, "setting"),
            DATA.runs.map((run) => element("th", { scope: "col" }, run.name)),
          ),
        ),
        element(
          "tbody",
          {},
          shown.map(({ name, texts, differs }) =>
            element(
              "tr",
              { class: many && differs ? "differs" : null },
              element("th", { scope: "row" }, name),
              texts.map((text) => element("td", {}, text ?? "–")),
            ),
          ),
        ),
      ),
    ),
  );
}

// ── live ───────────────────────────────────────────────────────────────────────────────────────────────────────

const PAUSE = 3000;

function append(run, news) {
  const before = run.columns.step?.length || 0,
    more = news.columns.step?.length || 0;
  const fill = (values, count) => values || Array(count).fill(null);
  for (const name of new Set([...Object.keys(run.columns), ...Object.keys(news.columns)]))
    run.columns[name] = [...fill(run.columns[name], before), ...fill(news.columns[name], more)];
  run.rollouts.push(...news.rollouts);
  run.points = {};
  for (const name of Object.keys(news)) if (name !== "columns" && name !== "rollouts") run[name] = news[name];
  return { lines: more > 0, rollouts: news.rollouts.length > 0 };
}

// What has grown is drawn anew; the cursor, the hidden runs, the sample and the scrolled place stay.
function take(news) {
  const height = () => byId("group")?.getBoundingClientRect().top,
    before = height();
  const known = new Set(charts.map((chart) => chart.metric)),
    kinds = DATA.runs.map((run) => run.kind).join();
  Object.assign(DATA.images, news.images);
  DATA.made = news.made;
  const grown = DATA.runs.map((run, i) => append(run, news.runs[i]));
  buildOverview();
  if (grown.some((run) => run.lines)) {
    const metrics = training().flatMap((run) =>
      Object.keys(run.columns).filter((name) => constant([run], name) === null),
    );
    if (
      kinds !== DATA.runs.map((run) => run.kind).join() ||
      metrics.some((name) => !known.has(name) && name !== "step" && name !== "epoch")
    ) {
      buildLegend();
      buildCharts();
    } else drawCharts();
  }
  if (grown.some((run) => run.rollouts)) keepPlace(buildBrowser);
  // not every browser does it by itself: what is looked at stays where it is, however many charts come above it
  if (before < innerHeight) scrollBy({ top: height() - before, behavior: "instant" });
}

function keepPlace(rebuild) {
  const here = browser.groups?.[browser.at],
    inside = byId("browser").contains(document.activeElement);
  if (here) {
    rebuild();
    const again = browser.groups.findIndex((group) => group.step === here.step && group.id === here.id);
    if (again >= 0 && again !== browser.at) show(again, false);
    if (inside) byId("group").focus({ preventScroll: true });
  } else rebuild();
}

async function poll() {
  const known = DATA.runs.map((run) => ({
    name: run.name,
    lines: run.columns.step?.length || 0,
    recorded: run.rollouts.at(-1)?.step ?? -1,
  }));
  try {
    const reply = await fetch("news?known=" + encodeURIComponent(JSON.stringify(known)));
    if (!reply.ok) throw new Error(await reply.text());
    const news = await reply.json();
    if (news.restart) return location.reload();
    take(news);
    byId("live").textContent = `live · ${news.made.split(" ")[1]}`;
  } catch {
    byId("live").textContent = "live · waiting for the server";
  }
  setTimeout(poll, PAUSE);
}

// ── begin ──────────────────────────────────────────────────────────────────────────────────────────────────────

buildOverview();
buildLegend();
buildCharts();
buildBrowser();
buildSettings();
byId("smoothing").addEventListener("input", (event) => {
  state.smoothing = Number(event.target.value);
  drawCharts();
});
document.addEventListener("keydown", browserKey);
new ResizeObserver(() => drawCharts()).observe(byId("panels"));
if (DATA.live) setTimeout(poll, PAUSE);
