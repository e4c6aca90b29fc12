// The page of a review. Boxes are [x1, y1, x2, y2] in source pixels everywhere but in draw().
"use strict";

const MARKS = { accepted: "✓ accepted", fixed: "✎ fixed", rejected: "✕ rejected" };
const REACH = { mouse: 9, pen: 14, touch: 22 }; // CSS pixels from an edge that still grab it
const LEAST_DRAG = 4; // CSS pixels; a shorter drag draws nothing
const LEAST_SIDE = 1; // source pixels

let sample = null; // what the server says of the sample that is shown; null at the end
let box = null;
let shown = false; // its picture is there: nothing is accepted unseen
let ended = false;
let busy = false;
let drawNew = false;
let drag = null;
let progress = null;
const drafts = new Map(); // place → {box, past}: changes of boxes that have no verdict yet
const given = []; // verdicts of this page, for undo: {place, sample_id, before, draft}

const picture = (place) => pictureOf(place, 6);

// ---- which sample ----------------------------------------------------------------------------------------------

const here = () => Number(location.hash.slice(1)) - 1;

let turn = 0;
async function show() {
  const mine = ++turn;
  const place = here();
  leave();
  try {
    if (location.hash === "#end") return end();
    const found = await (await ask(`samples/${Number.isInteger(place) && place >= 0 ? place : 0}`)).json();
    if (mine !== turn) return;
    sample = found;
    const draft = drafts.get(sample.place);
    box = draft ? draft.box : (sample.verdict && sample.verdict.box) || sample.box;
    $("instruction").textContent = sample.instruction;
    $("instruction").scrollTop = 0;
    render();
    const url = await picture(sample.place);
    if (mine !== turn) return;
    $("picture").src = url;
    await $("picture").decode();
    if (mine !== turn) return;
    shown = true;
    notice(null);
    $("frame").hidden = false;
    fit();
    render();
    for (const next of [sample.next_left, sample.place + 1]) {
      if (next !== null && next < progress.total) picture(next).catch(() => {});
    }
  } catch (error) {
    if (mine !== turn) return;
    notice(sample ? `${error.message}\n\nThis sample can only be rejected or skipped.` : error.message);
    render();
  }
}

function leave() {
  sample = box = null;
  shown = ended = false;
  drag = null;
  drawNew = false;
  $("frame").hidden = true;
  notice(null);
  render();
}

function end() {
  ended = true;
  $("instruction").textContent = "";
  notice(progress.left
    ? `The last sample. ${progress.left} that were skipped have no verdict yet: press Enter to go to them.`
    : "Every sample has a verdict. Ctrl-C in the terminal ends the review and prints its summary.");
  render();
}

// ---- what is seen ----------------------------------------------------------------------------------------------

const same = (a, b) => a === b || (a && b && a.every((value, side) => value === b[side]));
const changed = () => box !== null && !same(box, sample.box);
const past = () => drafts.get(sample.place)?.past ?? [];

function render() {
  const done = progress.total - progress.left;
  $("bar").max = progress.total;
  $("bar").value = done;
  $("counts").textContent =
    `${done} of ${progress.total}: ✓ ${progress.accepted} accepted, ✎ ${progress.fixed} fixed, ` +
    `✕ ${progress.rejected} rejected`;
  $("number").textContent = sample ? `${sample.place + 1}.` : "";
  const aside = sample?.set_aside && `set aside by the extraction: ${sample.set_aside}`;
  $("which").textContent = sample ? [sample.sample_id, sample.task, aside].filter(Boolean).join(", ") : "";
  const verdict = sample?.verdict;
  $("held").textContent = verdict
    ? `${MARKS[verdict.verdict]}${verdict.reason ? `: ${verdict.reason}` : ""}`
    : sample && shown && !sample.box && !box ? "no box yet: drag to draw one" : "";
  $("about").title = $("about").innerText; // it may be cut
  $("accept-text").textContent = !sample ? "Go on" : changed() ? "✎ Keep the fix" : "✓ Accept";
  $("accept").disabled = busy || (sample ? !shown || !box : !ended || !progress.left);
  $("reject").disabled = busy || !sample;
  $("draw").disabled = busy || !shown;
  $("skip").disabled = busy || !sample;
  $("back").disabled = busy || (sample ? sample.place === 0 : !progress.total);
  $("undo").disabled = busy || !((sample && past().length) || given.length);
  draw();
}

function fit() {
  if (!sample || !shown) return;
  const { clientWidth, clientHeight } = $("stage");
  const scale = Math.min(clientWidth / sample.width, clientHeight / sample.height);
  $("frame").style.width = `${sample.width * scale}px`;
  $("frame").style.height = `${sample.height * scale}px`;
  draw();
}

function draw() {
  const overlay = $("overlay");
  overlay.classList.toggle("changed", Boolean(sample) && changed());
  const seen = shown && box !== null;
  for (const line of overlay.querySelectorAll(":scope > rect")) line.toggleAttribute("hidden", !seen);
  const handles = $("handles");
  if (!seen) return handles.replaceChildren();
  const { width, height } = overlay.getBoundingClientRect();
  const [x1, x2] = [box[0], box[2]].map((x) => (x * width) / sample.width);
  const [y1, y2] = [box[1], box[3]].map((y) => (y * height) / sample.height);
  const place = (rect, x, y, w, h) => {
    for (const [name, value] of Object.entries({ x, y, width: w, height: h })) rect.setAttribute(name, value);
  };
  for (const line of overlay.querySelectorAll(":scope > rect")) place(line, x1, y1, x2 - x1, y2 - y1);
  const points = [[x1, y1], [x2, y1], [x1, y2], [x2, y2]];
  if (x2 - x1 > 50) points.push([(x1 + x2) / 2, y1], [(x1 + x2) / 2, y2]);
  if (y2 - y1 > 50) points.push([x1, (y1 + y2) / 2], [x2, (y1 + y2) / 2]);
  while (handles.childElementCount < points.length) {
    handles.append(document.createElementNS("http://www.w3.org/2000/svg", "rect"));
  }
  while (handles.childElementCount > points.length) handles.lastElementChild.remove();
  const side = x2 - x1 < 24 || y2 - y1 < 24 ? 6 : 9;
  points.forEach(([x, y], i) => place(handles.children[i], x - side / 2, y - side / 2, side, side));
}

// ---- changing the box ------------------------------------------------------------------------------------------

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const limits = () => [sample.width, sample.height];

function change(next, before = box) {
  if (!same(next, before)) {
    box = next.map((value, side) => clamp(Math.round(value * 100) / 100, 0, limits()[side % 2]));
    drafts.set(sample.place, { box, past: [...past(), before] });
  }
  render();
}

function moved([x1, y1, x2, y2], dx, dy) {
  dx = clamp(dx, -x1, sample.width - x2);
  dy = clamp(dy, -y1, sample.height - y2);
  return [x1 + dx, y1 + dy, x2 + dx, y2 + dy];
}

function resized(start, grip, dx, dy) {
  const next = [...start];
  const pull = (low, size, by, which) => {
    const high = low + 2;
    const least = Math.min(LEAST_SIDE, start[high] - start[low]);
    if (which === "low") next[low] = clamp(start[low] + by, 0, start[high] - least);
    if (which === "high") next[high] = clamp(start[high] + by, start[low] + least, size);
  };
  pull(0, sample.width, dx, grip.x);
  pull(1, sample.height, dy, grip.y);
  return next;
}

function point(event) {
  const { left, top, width, height } = $("overlay").getBoundingClientRect();
  return [((event.clientX - left) * sample.width) / width, ((event.clientY - top) * sample.height) / height];
}

// What is under a point: {x, y} each "low", "high" (an edge) or "in"; null outside the box.
function grip([x, y], kind) {
  if (!box || drawNew) return null;
  const reach = ((REACH[kind] ?? REACH.mouse) * sample.width) / $("overlay").getBoundingClientRect().width;
  const near = (at, low, high) => {
    const inner = Math.min(reach, (high - low) / 3); // a small box can still be moved
    if (at < low - reach || at > high + reach) return null;
    if (at <= low + inner) return "low";
    return at >= high - inner ? "high" : "in";
  };
  const found = { x: near(x, box[0], box[2]), y: near(y, box[1], box[3]) };
  return found.x && found.y ? found : null;
}

function cursor(found) {
  if (!found) return "crosshair";
  if (found.x === "in") return found.y === "in" ? "move" : "ns-resize";
  if (found.y === "in") return "ew-resize";
  return found.x === found.y ? "nwse-resize" : "nesw-resize";
}

$("overlay").addEventListener("pointerdown", (event) => {
  if (!shown || busy || drag || event.button !== 0 || !event.isPrimary) return;
  event.preventDefault();
  const from = point(event);
  drag = { id: event.pointerId, from, at: [event.clientX, event.clientY], start: box, grip: grip(from, event.pointerType) };
  $("overlay").setPointerCapture(event.pointerId);
});

$("overlay").addEventListener("pointermove", (event) => {
  if (!shown) return;
  const to = point(event);
  if (!drag) {
    $("overlay").style.cursor = cursor(grip(to, event.pointerType));
    return;
  }
  if (event.pointerId !== drag.id) return;
  const [dx, dy] = [to[0] - drag.from[0], to[1] - drag.from[1]];
  if (!drag.grip) {
    const far = Math.hypot(event.clientX - drag.at[0], event.clientY - drag.at[1]) >= LEAST_DRAG;
    box = far ? drawn(drag.from, to) : drag.start;
  } else if (drag.grip.x === "in" && drag.grip.y === "in") {
    box = moved(drag.start, dx, dy);
  } else {
    box = resized(drag.start, drag.grip, dx, dy);
  }
  draw();
});

function drawn(a, b) {
  const next = [0, 0, 0, 0];
  limits().forEach((size, axis) => {
    const [low, high] = [a[axis], b[axis]].map((at) => clamp(at, 0, size)).sort((p, q) => p - q);
    next[axis] = Math.max(Math.min(low, size - LEAST_SIDE), 0);
    next[axis + 2] = Math.max(high, next[axis] + LEAST_SIDE);
  });
  return next;
}

function drop(event, keep) {
  if (!drag || event.pointerId !== drag.id) return;
  const [next, start] = [box, drag.start];
  drag = null;
  box = start;
  if (keep && next && !same(next, start)) {
    drawNew = false;
    say("");
    change(next, start);
  }
  render();
}
$("overlay").addEventListener("pointerup", (event) => drop(event, true));
$("overlay").addEventListener("pointercancel", (event) => drop(event, false));

// ---- verdicts --------------------------------------------------------------------------------------------------

async function send(place, body) {
  busy = true;
  render();
  try {
    const told = await (await ask("verdicts", body)).json();
    progress = told.progress;
    return told;
  } catch (error) {
    say(`Not kept: ${error.message}`, true);
    return null;
  } finally {
    busy = false;
    render();
  }
}

async function judge(verdict, reason = null) {
  const { place, sample_id, verdict: before } = sample;
  const draft = drafts.get(place);
  const told = await send(place, { sample_id, verdict, box: verdict === "rejected" ? null : box, reason });
  if (!told) return;
  drafts.delete(place);
  given.push({ place, sample_id, before, draft });
  say(`${MARKS[verdict]}: ${sample_id}. Undo takes it back.`);
  go(told.next_left);
}

function accept() {
  if ($("accept").disabled || drag) return;
  if (!sample) return start();
  judge(changed() ? "fixed" : "accepted");
}

function reject() {
  if ($("reject").disabled || drag) return;
  $("reason").value = sample.verdict?.reason ?? "";
  $("reject-dialog").showModal();
  $("reason").select();
}

async function undo() {
  if ($("undo").disabled || drag) return;
  if (sample && past().length) {
    const { past: steps } = drafts.get(sample.place);
    box = steps.at(-1);
    if (steps.length === 1) drafts.delete(sample.place);
    else drafts.set(sample.place, { box, past: steps.slice(0, -1) });
    return render();
  }
  const { place, sample_id, before, draft } = given.at(-1);
  const restored = before ?? { verdict: "withdrawn", box: null, reason: null };
  if (!(await send(place, { sample_id, ...restored }))) return;
  given.pop();
  if (draft) drafts.set(place, draft);
  say(before ? `Taken back; ${sample_id} is ${before.verdict} as before.` : `Taken back: ${sample_id} has no verdict.`);
  go(place);
}

function back() {
  if (!$("back").disabled && !drag) go(sample ? sample.place - 1 : progress.total - 1);
}

function skip() {
  if ($("skip").disabled || drag) return;
  go(sample.place + 1 < progress.total ? sample.place + 1 : null);
}

function newBox() {
  if ($("draw").disabled || drag) return;
  drawNew = true;
  $("overlay").style.cursor = "crosshair";
  say("Drag on the picture to draw a new box.");
}

function nudge(key, resize) {
  if (!box || !shown || busy || drag) return;
  const step = Math.max(1, Math.round(sample.width / $("overlay").getBoundingClientRect().width));
  const [dx, dy] = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[key];
  change(resize ? resized(box, { x: dx ? "high" : "in", y: dy ? "high" : "in" }, dx, dy) : moved(box, dx, dy));
}

const KEYS = { Enter: accept, a: accept, r: reject, Backspace: back, s: skip, u: undo, n: newBox, "?": help };

function help() {
  $("keys-dialog").showModal();
}

document.addEventListener("keydown", (event) => {
  if (!progress || document.querySelector("dialog[open]") || event.isComposing) return;
  const letter = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && letter === "z" && !event.shiftKey) {
    event.preventDefault();
    return undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) {
    event.preventDefault();
    return nudge(event.key, event.shiftKey);
  }
  if (letter === "h") return $("overlay").classList.add("away");
  // A button that the keyboard chose is pressed by Enter itself; a key held down is one verdict, not many.
  if (!KEYS[letter] || (event.key === "Enter" && event.target.tagName === "BUTTON")) return;
  event.preventDefault();
  if (!event.repeat) KEYS[letter]();
});
const unhide = () => $("overlay").classList.remove("away");
document.addEventListener("keyup", (event) => event.key.toLowerCase() === "h" && unhide());
window.addEventListener("blur", unhide);

const BUTTONS = { accept, reject, back, skip, undo, draw: newBox, keys: help };
for (const [id, press] of Object.entries(BUTTONS)) {
  $(id).addEventListener("click", (event) => {
    if (event.detail) $(id).blur(); // pressed by a pointer: Enter means the box again
    press();
  });
}
$("reject-cancel").addEventListener("click", () => $("reject-dialog").close());
$("reject-dialog").addEventListener("submit", (event) => {
  event.preventDefault();
  $("reject-dialog").close();
  judge("rejected", $("reason").value.trim() || null);
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("close", () => {
    if (!document.querySelector("dialog[open]")) document.activeElement?.blur(); // told late: another may be open
  });
}

async function start() {
  try {
    const told = await (await ask("progress")).json();
    progress = told.progress;
    go(told.next_left);
  } catch (error) {
    notice(error.message);
  }
}

window.addEventListener("hashchange", () => progress && show());
new ResizeObserver(fit).observe($("stage"));
start();
