// The rollout browser: one recorded group at a time, its completions ordered by advantage, every token tinted.

const TINTS = {
  push: {
    name: "advantage × (ratio − 1)",
    value: (c, i) => (c.ratio?.[i] == null ? 0 : c.advantage * (c.ratio[i] - 1)),
    low: "against the reward",
    high: "as the reward asked",
    about: "How the updates of this rollout moved each token: its ratio after them, times the completion's advantage.",
  },
  drift: {
    name: "logp − reference",
    value: (c, i) => (c.ref_logp?.[i] == null ? 0 : c.logp[i] - c.ref_logp[i]),
    low: "rarer than in Stage 1",
    high: "likelier than in Stage 1",
    about: "How far each token's log-probability has moved from the reference's since training began.",
  },
  surprise: {
    name: "surprise, −logp",
    value: (c, i) => (c.logp?.[i] == null ? 0 : c.logp[i]),
    low: "unlikely when drawn",
    high: "",
    about: "Where the policy was unsure: tokens that it drew although they were unlikely.",
  },
};

const browser = { run: null, at: 0, tint: "push", open: false };

const recorded = () => DATA.runs.filter((run) => run.rollouts.length);
const groupsOf = (run) =>
  run.rollouts.flatMap((record) =>
    record.groups.map((group) => ({ ...group, step: record.step, epoch: record.epoch, record })),
  );
const mean = (values) => sum(values) / values.length;
const ordered = (group) => [...group.completions].sort((a, b) => b.advantage - a.advantage);

function buildBrowser() {
  const runs = recorded();
  if (!runs.length) {
    byId("browser").replaceChildren(
      element("p", { class: "nothing" }, "No rollouts are recorded in these runs (grpo.train --rollout_log_groups)."),
    );
    return;
  }
  browser.run =
    runs.find((run) => run.name === browser.run?.name) ||
    runs.reduce((most, run) => (run.rollouts.length > most.rollouts.length ? run : most));
  browser.groups = groupsOf(browser.run);
  const choose = element(
    "select",
    {
      "aria-label": "Run",
      onchange: (event) => {
        browser.run = runs[event.target.selectedIndex];
        browser.at = 0;
        buildBrowser();
      },
    },
    runs.map((run) => element("option", { selected: run === browser.run }, run.name)),
  );
  const tints = element(
    "select",
    {
      "aria-label": "Tokens are tinted by",
      onchange: (event) => {
        browser.tint = event.target.value;
        show(browser.at);
      },
    },
    Object.entries(TINTS).map(([key, tint]) =>
      element("option", { value: key, selected: key === browser.tint }, tint.name),
    ),
  );
  byId("browser").replaceChildren(
    element(
      "div",
      { class: "toolbar" },
      runs.length > 1 ? choose : null,
      element(
        "div",
        { class: "steps" },
        element(
          "button",
          { type: "button", onclick: () => show(browser.at - 1), "aria-label": "Previous sample" },
          "‹",
        ),
        element("button", { type: "button", onclick: () => show(browser.at + 1), "aria-label": "Next sample" }, "›"),
      ),
      element("p", { class: "where", id: "where" }),
      element(
        "button",
        { type: "button", id: "unfold", "aria-pressed": String(browser.open), onclick: unfold },
        "Unfold steps",
      ),
      element("label", { class: "tint" }, "Tint ", tints),
    ),
    element("div", { class: "strip", id: "strip" }, strip()),
    element(
      "p",
      { class: "keys" },
      key("j"),
      key("k"),
      " next and previous sample · ",
      key("↓"),
      key("↑"),
      " next and previous step · ",
      key("u"),
      " unfold · a square is a recorded group, stronger for more reward, a ring where it has zero variance",
    ),
    element("div", { id: "group", class: "group", tabindex: -1 }),
  );
  show(Math.min(browser.at, browser.groups.length - 1), false);
}

const key = (name) => element("kbd", {}, name);

// One column a record, one square a group, filled by its mean reward between the lowest and the highest recorded.
function strip() {
  const rewards = browser.groups.map((group) => mean(group.completions.map((c) => c.reward)));
  const low = Math.min(...rewards),
    high = Math.max(...rewards);
  let at = 0;
  return browser.run.rollouts.map((record) =>
    element(
      "div",
      { class: "column" },
      record.groups.map((group) => {
        const index = at++,
          share = high > low ? (rewards[index] - low) / (high - low) : 1;
        return element("button", {
          type: "button",
          class: group.completions.some((c) => c.advantage) ? "cell" : "cell flat",
          tabindex: -1,
          "data-at": index,
          style: `--share:${(12 + 88 * share).toFixed(0)}%`,
          title: `step ${record.step}, ${group.id}: mean reward ${short(rewards[index])}`,
          onclick: () => show(index),
        });
      }),
      element("span", { class: "tick" }, String(record.step)),
    ),
  );
}

function show(index, announce = true) {
  if (!browser.groups?.length) return;
  browser.at = Math.min(Math.max(index, 0), browser.groups.length - 1);
  const group = browser.groups[browser.at];
  for (const cell of byId("strip").querySelectorAll(".cell"))
    cell.toggleAttribute("data-here", Number(cell.dataset.at) === browser.at);
  const here = byId("strip").querySelector("[data-here]").parentElement,
    track = byId("strip");
  if (here.offsetLeft < track.scrollLeft || here.offsetLeft + here.offsetWidth > track.scrollLeft + track.clientWidth)
    track.scrollLeft = here.offsetLeft - track.clientWidth / 2;
  byId("where").replaceChildren(
    element("b", {}, `${browser.at + 1} of ${browser.groups.length}`),
    ` · step ${group.step}${group.epoch === undefined ? "" : `, epoch ${group.epoch + 1}`} · `,
    element("span", { class: "sample" }, group.id),
  );
  byId("unfold").setAttribute("aria-pressed", String(browser.open));
  const cards = ordered(group),
    tint = TINTS[browser.tint],
    scale = scaleOf(cards, tint);
  byId("group").replaceChildren(
    promptView(group, scale, tint),
    element(
      "ol",
      { class: "cards" },
      cards.map((completion, rank) => card(completion, rank, scale, tint)),
    ),
  );
  hideTip();
  if (announce) say(`sample ${browser.at + 1} of ${browser.groups.length}, step ${group.step}, ${group.id}`);
}

// The tint is full where 98 of 100 tokens of the group lie below.
function scaleOf(cards, tint) {
  const sizes = cards
    .flatMap((c) => c.pieces.map((_, i) => Math.abs(tint.value(c, i))))
    .filter(Boolean)
    .sort((a, b) => a - b);
  return sizes[Math.floor(sizes.length * 0.98)] || sizes.at(-1) || 1;
}

// ── what was asked ─────────────────────────────────────────────────────────────────────────────────────────────

function promptView(group, scale, tint) {
  const rewards = group.completions.map((c) => c.reward),
    gold = (group.target || "").replace(/<\/?answer>/g, "").trim();
  return element(
    "div",
    { class: "prompt" },
    (group.images || []).map((path) => imageWithBox(path, group.box)),
    group.text ? element("p", { class: "text" }, marked(group.text, group.entity)) : null,
    element(
      "dl",
      { class: "facts" },
      group.entity ? [element("dt", {}, "Entity"), element("dd", {}, element("mark", {}, group.entity))] : null,
      gold ? [element("dt", {}, "Gold"), element("dd", { class: "gold" }, gold)] : null,
      element("dt", {}, "Reward"),
      element(
        "dd",
        {},
        `${short(mean(rewards))} mean, ${short(Math.min(...rewards))} to ${short(Math.max(...rewards))}`,
      ),
    ),
    element(
      "details",
      { class: "whole-prompt", open: !group.text },
      element("summary", {}, "Prompt as the model reads it"),
      element("pre", { tabindex: 0 }, group.prompt || ""),
    ),
    tintLegend(scale, tint, group),
  );
}

function tintLegend(scale, tint, group) {
  if (tint === TINTS.push && group.completions.every((c) => !c.advantage))
    return element("p", { class: "tints" }, "A zero-variance group: equal rewards, no advantage, nothing to tint.");
  return element(
    "div",
    { class: "tints", title: tint.about },
    element("p", {}, tint.name),
    element("div", { class: "scale" + (tint.high ? "" : " half"), "aria-hidden": "true" }),
    element(
      "p",
      { class: "ends" },
      element("span", {}, `−${short(scale)} ${tint.low}`),
      tint.high ? element("span", {}, `${tint.high} +${short(scale)}`) : element("span", {}, "0"),
    ),
    element("p", { class: "about" }, tint.about),
  );
}

// The image with its box, and what the box cuts out: both show the same embedded file.
function imageWithBox(path, box) {
  const known = DATA.images[path],
    name = path.split("/").at(-1);
  if (!known?.src) return element("p", { class: "no-picture" }, `${name}: ${known?.missing || "not embedded"}`);
  const { src, width, height } = known,
    tiny = width < 160;
  const image = () => drawing("image", { href: src, width, height, class: tiny ? "tiny" : null });
  const whole = (label, view, ...inside) =>
    drawing("svg", { viewBox: view, role: "img", "aria-label": label }, ...inside);
  if (!box) return element("figure", { class: "picture" }, whole(name, `0 0 ${width} ${height}`, image()));
  const left = Math.max(0, box[0] - box[2] / 2) * width,
    top = Math.max(0, box[1] - box[3] / 2) * height;
  const right = Math.min(1, box[0] + box[2] / 2) * width,
    bottom = Math.min(1, box[1] + box[3] / 2) * height;
  const place = { x: left, y: top, width: right - left, height: bottom - top, "vector-effect": "non-scaling-stroke" };
  return element(
    "figure",
    { class: "picture" },
    whole(
      `${name} with the object's box`,
      `0 0 ${width} ${height}`,
      image(),
      drawing("rect", { class: "halo", ...place }),
      drawing("rect", { class: "box", ...place }),
    ),
    whole("the object", `${left} ${top} ${right - left} ${bottom - top}`, image()),
  );
}

function marked(text, entity) {
  if (!entity) return [text];
  return text.split(entity).flatMap((part, i) => (i ? [element("mark", {}, entity), part] : [part]));
}

// ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────────

function unfold() {
  browser.open = !browser.open;
  show(browser.at, false);
}

// The same place in the record before or after.
function otherStep(by) {
  const steps = [...new Set(browser.groups.map((group) => group.record))],
    here = browser.groups[browser.at];
  const next = steps[Math.min(Math.max(steps.indexOf(here.record) + by, 0), steps.length - 1)];
  const place = browser.groups.filter((group) => group.record === here.record).indexOf(here);
  const there = browser.groups.map((group, i) => [group, i]).filter(([group]) => group.record === next);
  show(there[Math.min(place, there.length - 1)][1]);
}

function browserKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || TYPING.has(event.target.tagName) || !browser.groups?.length)
    return;
  const inside = byId("rollouts").contains(document.activeElement);
  const keys = { j: () => show(browser.at + 1), k: () => show(browser.at - 1), u: unfold, Escape: hideTip };
  if (inside)
    Object.assign(keys, {
      ArrowRight: keys.j,
      ArrowLeft: keys.k,
      ArrowDown: () => otherStep(1),
      ArrowUp: () => otherStep(-1),
    });
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
  if (!inside && event.key !== "Escape") {
    byId("group").focus({ preventScroll: true });
    byId("rollouts").scrollIntoView();
  }
}
