// A completion as a card: its parts, its folded steps, its tinted tokens and their numbers.

function card(completion, rank, scale, tint) {
  const { advantage, reward, parts, pieces, finished } = completion;
  const chips = Object.entries(parts || {}).map(([name, value]) =>
    element("span", { class: "chip " + (value > 0 ? "some" : "none") }, name, " ", element("b", {}, short(value))),
  );
  return element(
    "li",
    { class: "card", style: `--advantage:${Math.max(-1, Math.min(1, advantage / 2))}` },
    element(
      "header",
      {},
      element("span", { class: "rank" }, `${rank + 1}`),
      element(
        "span",
        { class: "advantage " + (advantage > 0 ? "up" : advantage < 0 ? "down" : "") },
        signed(advantage),
      ),
      element("span", { class: "total" }, `reward ${short(reward)}`),
      element("span", { class: "length" }, `${pieces.length} tokens${finished === false ? ", cut" : ""}`),
    ),
    element("div", { class: "chips" }, chips),
    element(
      "div",
      {
        class: "tokens",
        tabindex: 0,
        role: "group",
        "aria-label": `Completion ${rank + 1}, advantage ${signed(advantage)}`,
        onpointerover: (event) => tokenTip(event.target, completion),
        onpointerleave: hideTip,
        onkeydown: (event) => tokenKey(event, completion),
        onblur: hideTip,
      },
      segments(pieces).map((segment) => segmentView(segment, completion, scale, tint)),
    ),
  );
}

// Runs of tokens: before the steps, each step, and from </think> on. A marker may begin inside a token.
function segments(pieces) {
  const starts = [],
    text = pieces.join("");
  let place = 0;
  for (const piece of pieces) {
    starts.push(place);
    place += piece.length;
  }
  const tokenAt = (index) => {
    let i = starts.length - 1;
    while (i > 0 && starts[i] > index) i--;
    return i;
  };
  const marks = [...text.matchAll(/Step (\d+):|<\/think>|<answer>/g)].map((match) => ({
    at: tokenAt(match.index),
    step: match[1],
  }));
  const cuts = [{ at: 0 }];
  for (const mark of marks) {
    const before = cuts.at(-1);
    if (mark.at === before.at) before.step ??= mark.step;
    else if (mark.step || before.step) cuts.push(mark);
  }
  return cuts
    .map((cut, i) => ({ step: cut.step, from: cut.at, to: cuts[i + 1]?.at ?? pieces.length }))
    .filter(({ from, to }) => to > from);
}

function segmentView({ step, from, to }, completion, scale, tint) {
  const spans = completion.pieces.slice(from, to).map((piece, i) => token(piece, from + i, completion, scale, tint));
  if (!step) return element("p", { class: "plain" }, spans);
  return element(
    "details",
    { open: browser.open, class: "step" },
    element("summary", {}, element("span", { class: "line" }, spans)),
  );
}

function token(piece, index, completion, scale, tint) {
  const value = tint.value(completion, index),
    strength = Math.sqrt(Math.min(1, Math.abs(value) / scale)); // the root shows small changes too
  const span = element("span", { class: value < 0 ? "t down" : "t", "data-i": index }, piece || "·");
  if (strength > 0.02) span.style.setProperty("--strength", `${(strength * 85).toFixed(0)}%`);
  return span;
}

// ── a token's numbers, under the pointer or the token cursor ───────────────────────────────────────────────────

function tokenTip(span, completion) {
  if (!span.dataset?.i) return hideTip();
  const i = Number(span.dataset.i),
    { logp, ref_logp: ref, ratio, advantage } = completion;
  const share = (value) => (value == null ? "–" : `${short(100 * Math.exp(value))} %`);
  const rows = [
    ["probability", share(logp?.[i])],
    ["reference", ref ? share(ref[i]) : null],
    ["ratio", ratio ? ratio[i] : null],
    ["advantage × (ratio − 1)", ratio?.[i] == null ? null : signed(advantage * (ratio[i] - 1))],
  ].filter((row) => row[1] !== null);
  const tip = byId("tip"),
    at = span.getBoundingClientRect();
  tip.replaceChildren(
    element("code", {}, JSON.stringify(completion.pieces[i])),
    element(
      "dl",
      {},
      rows.map(([name, value]) => [
        element("dt", {}, name),
        element("dd", {}, typeof value === "number" ? value.toFixed(4) : value),
      ]),
    ),
  );
  tip.hidden = false;
  const wide = tip.offsetWidth,
    below = at.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - wide - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
  return rows;
}

function hideTip() {
  byId("tip").hidden = true;
  document.querySelector(".t.here")?.classList.remove("here");
}

// Left and right walk through the tokens of the completion that has the focus.
function tokenKey(event, completion) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by || event.target !== event.currentTarget) return;
  event.preventDefault();
  event.stopPropagation();
  const spans = [...event.currentTarget.querySelectorAll(".t")],
    old = spans.findIndex((span) => span.classList.contains("here"));
  hideTip();
  const span = spans[Math.min(Math.max(old + by, 0), spans.length - 1)];
  span.classList.add("here");
  span.scrollIntoView({ block: "nearest" });
  const rows = tokenTip(span, completion);
  say(`${completion.pieces[Number(span.dataset.i)]}: ${rows.map(([name, value]) => `${name} ${value}`).join(", ")}`);
}
