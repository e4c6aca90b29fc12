// The page on which a person judges edited pictures. A pair is known by its place alone.
"use strict";

const SIDES = ["source", "edited"];
const PACED = 30; // pairs whose time is looked at

let rubric = [];
let progress = null;
let pair = null; // what the server says of the pair that is shown; null at the end
let shown = false; // both its pictures are there: nothing is graded unseen
let ended = false;
let over = false; // the command has ended by this page's doing
let busy = false;
let current = null; // the question that a digit answers; null when all are answered
let one = false; // one picture at a time, in one place
let begun = 0; // when the pair was shown
const seconds = []; // how long the last pairs took
const given = []; // answers of this page, for undo: {place, question, before}

const picture = (place, side) => pictureOf(`${place}/${side}`, 12);

// ---- which pair ------------------------------------------------------------------------------------------------

let turn = 0;
let wanted = null; // the question to begin with, after an undo
async function show() {
  const mine = ++turn;
  const place = Number(location.hash.slice(1)) - 1;
  const question = wanted;
  wanted = null;
  if (!question) say("");
  pair = null;
  shown = ended = false;
  $("pictures").hidden = true;
  $("pictures").classList.remove("edited");
  notice(null);
  attend(null);
  try {
    if (location.hash === "#end") return end();
    const found = await (await ask(`pairs/${Number.isInteger(place) && place >= 0 ? place : 0}`)).json();
    if (mine !== turn) return;
    pair = found;
    $("instruction").textContent = pair.instruction;
    $("instruction").scrollTop = 0;
    render();
    if (pair.trouble) return notice(`This pair is set aside: ${pair.trouble}.\n\nGo on to the next.`);
    const urls = await Promise.all(SIDES.map((side) => picture(pair.place, side)));
    if (mine !== turn) return;
    SIDES.forEach((side, i) => ($(side).src = urls[i]));
    await Promise.all(SIDES.map((side) => $(side).decode()));
    if (mine !== turn) return;
    shown = true;
    begun = performance.now();
    $("pictures").hidden = false;
    fit();
    attend(question ?? unanswered());
    for (const next of [pair.next_left, pair.place + 1]) {
      if (next === null || next >= progress.total) continue;
      for (const side of SIDES) picture(next, side).catch(() => {});
    }
  } catch (error) {
    if (mine !== turn) return;
    notice(pair ? `${error.message}\n\nNext goes on without an answer.` : error.message);
    render();
  }
}

const left = () => progress.total - progress.judged - progress.aside;

function end() {
  ended = true;
  $("instruction").textContent = "";
  const aside = progress.aside ? `\n\n${progress.aside} could not be shown: the table says why.` : "";
  notice(over
    ? "Finished. The table of verdicts is written by the command; this page can be closed."
    : left()
      ? `The last pair. ${left()} that were skipped are not judged yet: Next goes to them.${aside}`
      : `Every pair is judged. With Finish the command writes the table of verdicts and ends. Until then every answer can be changed.${aside}`);
  render();
}

// ---- what is seen ----------------------------------------------------------------------------------------------

function pace() {
  if (seconds.length < 3 || !left()) return "";
  const sorted = seconds.slice(-PACED).sort((a, b) => a - b);
  const each = sorted[sorted.length >> 1]; // the median: a break counts as one pair
  const minutes = Math.max(1, Math.round((each * left()) / 60));
  const rest = minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
  return `, ${each < 10 ? each.toFixed(1) : Math.round(each)} s each, about ${rest} left`;
}

const complete = () => rubric.every(({ name }) => name in pair.grades);
const unanswered = () => rubric.find(({ name }) => !(name in pair.grades))?.name ?? null;

function render() {
  const { total, judged, aside } = progress;
  $("bar").max = Math.max(1, total - aside);
  $("bar").value = judged;
  $("counts").textContent = `${judged} of ${total - aside} judged${aside ? `, ${aside} set aside` : ""}${pace()}`;
  $("told").hidden = !pair;
  $("number").textContent = pair ? `Pair ${pair.place + 1} of ${total}.` : "";
  for (const { name } of rubric) {
    const group = $(`question-${name}`);
    const grade = pair?.grades[name];
    group.disabled = !shown;
    group.classList.toggle("current", shown && name === current);
    group.classList.toggle("answered", grade !== undefined);
    if (!busy) for (const option of group.elements) option.checked = Number(option.value) === grade;
  }
  $("next-text").textContent = pair || left() || !ended ? "Next" : "Finish";
  $("next").disabled = busy || over || !(ended || (pair && (!shown || complete())));
  $("skip").disabled = busy || over || !pair;
  $("back").disabled = busy || over || (pair ? pair.place === 0 : !progress.total);
  $("undo").disabled = busy || over || !given.length;
  $("flicker").disabled = $("both").disabled = !shown;
  $("both").setAttribute("aria-pressed", String(!one));
  $("pictures").classList.toggle("one", one);
}

// Both pictures in frames of the source's shape and of one size: one scale, and one place for each point when flickering.
function fit() {
  if (!shown) return;
  const { clientWidth, clientHeight } = $("stage");
  const [width, height] = pair.size;
  const gap = parseFloat(getComputedStyle($("pictures")).columnGap);
  const caption = document.querySelector("figcaption").offsetHeight;
  const wide = one ? clientWidth : (clientWidth - gap) / 2;
  const scale = Math.max(0, Math.min(wide / width, (clientHeight - caption) / height));
  for (const frame of document.querySelectorAll(".frame")) {
    frame.style.width = `${width * scale}px`;
    frame.style.height = `${height * scale}px`;
  }
  $("box").hidden = !pair.box;
  if (pair.box) {
    const [x1, y1, x2, y2] = pair.box.map((share) => 100 * share);
    Object.assign($("box").style, { left: `${x1}%`, top: `${y1}%`, width: `${x2 - x1}%`, height: `${y2 - y1}%` });
  }
}

function flicker() {
  if (!shown) return;
  if (one) $("pictures").classList.toggle("edited");
  one = true;
  render();
  fit();
  say(`${$("pictures").classList.contains("edited") ? "Edited picture" : "Source"} is shown.`);
}

function both() {
  if (!shown) return;
  one = false;
  $("pictures").classList.remove("edited");
  render();
  fit();
  say("");
}

// ---- answers ---------------------------------------------------------------------------------------------------

// Make a question the one that digits answer, and bring it into sight.
function attend(name) {
  current = name;
  render();
  const group = name && $(`question-${name}`);
  if (!group) return $("questions").contains(document.activeElement) && document.activeElement.blur();
  if (!group.contains(document.activeElement)) group.focus({ preventScroll: true });
  group.scrollIntoView({ block: "nearest" });
}

async function send(body) {
  busy = true;
  render();
  try {
    const told = await (await ask("answers", body)).json();
    progress = told.progress;
    if (pair?.place === body.place) Object.assign(pair, { grades: told.grades, next_left: told.next_left });
    return told;
  } catch (error) {
    say(`Not kept: ${error.message}`, true);
    return null;
  } finally {
    busy = false;
    render();
  }
}

async function answer(question, grade, further) {
  if (!shown || question === null) return;
  const { place } = pair;
  const before = pair.grades[question] ?? null;
  if (before !== grade) {
    const first = !complete();
    if (!(await send({ place, question, grade }))) return;
    given.push({ place, question, before });
    if (pair?.place !== place) return;
    if (first && complete()) seconds.push((performance.now() - begun) / 1000);
  }
  const at = rubric.findIndex(({ name }) => name === question);
  attend(further ? rubric[at + 1]?.name ?? unanswered() : question);
  say(complete() ? "All three are answered: go on." : "");
}

async function undo() {
  if ($("undo").disabled) return;
  const { place, question, before } = given.at(-1);
  if (!(await send({ place, question, grade: before }))) return;
  given.pop();
  say(before === null ? "Taken back." : `Taken back; the answer is ${before} as before.`);
  if (pair?.place === place) return attend(question);
  wanted = question;
  go(place);
}

async function next() {
  if ($("next").disabled) {
    if (shown) {
      attend(unanswered());
      say("This question has no answer yet. → goes on without.");
    }
    return;
  }
  if (pair) return go(pair.trouble || !shown ? after() : pair.next_left);
  if (left()) return start();
  try {
    await ask("finish", {});
    over = true;
    say("");
  } catch (error) {
    say(error.message, true);
  }
  end();
}

const after = () => (pair.place + 1 < progress.total ? pair.place + 1 : null);

function skip() {
  if (!$("skip").disabled) go(after());
}

function back() {
  if (!$("back").disabled) go(pair ? pair.place - 1 : progress.total - 1);
}

function step(by) {
  if (!shown) return;
  const names = rubric.map(({ name }) => name);
  const at = current === null ? (by > 0 ? -1 : names.length) : names.indexOf(current);
  attend(names[Math.min(Math.max(at + by, 0), names.length - 1)]);
}

function help() {
  $("keys-dialog").showModal();
  $("keys-dialog").scrollTop = 0; // its button, which has the focus, is at the end
}

// One after the other: who types fast loses no key, and Enter comes after the answer before it.
let queue = Promise.resolve();
const inTurn = (act) => (queue = queue.then(act));

const KEYS = {
  Enter: next, n: next, ArrowRight: skip, s: skip, ArrowLeft: back, u: undo, Backspace: undo,
  ArrowUp: () => step(-1), ArrowDown: () => step(1), " ": flicker, f: flicker, b: both, Escape: both, "?": help,
};
// What a button, an answer or a text that can be scrolled does with a key by itself.
const OWN = {
  BUTTON: ["Enter", " "], INPUT: [" ", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"], P: ["ArrowUp", "ArrowDown"],
};

document.addEventListener("keydown", (event) => {
  if (!progress || document.querySelector("dialog[open]") || event.isComposing) return;
  const letter = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && letter === "z" && !event.shiftKey) {
    event.preventDefault();
    return inTurn(undo);
  }
  if (event.ctrlKey || event.metaKey || event.altKey || OWN[event.target.tagName]?.includes(event.key)) return;
  const grade = "01234".indexOf(letter);
  if (!KEYS[letter] && grade < 0) return;
  event.preventDefault();
  if (event.repeat) return; // a key held down is one answer, not many
  inTurn(grade >= 0 ? () => answer(current, grade, true) : KEYS[letter]);
});

const BUTTONS = { next, skip, back, undo, flicker, both, keys: help };
for (const [id, press] of Object.entries(BUTTONS)) {
  $(id).addEventListener("click", (event) => {
    if (event.detail) $(id).blur(); // pressed by a pointer: Space and Enter mean the pictures again
    inTurn(press);
  });
}
for (const frame of document.querySelectorAll(".frame")) frame.addEventListener("click", flicker);
$("keys-dialog").addEventListener("close", () => document.activeElement?.blur());
$("questions").addEventListener("submit", (event) => event.preventDefault());

function layOut() {
  rubric.forEach(({ name, question, meanings }, number) => {
    const group = document.createElement("fieldset");
    Object.assign(group, { id: `question-${name}`, tabIndex: -1, disabled: true });
    const legend = document.createElement("legend");
    legend.textContent = `${number + 1}. ${question[0].toUpperCase()}${question.slice(1)}`;
    group.append(legend);
    meanings.forEach((meaning, grade) => {
      const label = document.createElement("label");
      const option = document.createElement("input");
      Object.assign(option, { type: "radio", name, value: grade });
      const digit = document.createElement("b");
      digit.textContent = grade;
      const text = document.createElement("span");
      text.textContent = meaning;
      label.append(option, digit, text);
      group.append(label);
      // Arrow keys walk through the answers (their clicks have no detail): only a pointer has chosen for good.
      label.addEventListener("click", (event) => {
        if (event.target !== option) event.preventDefault(); // else the option is clicked a second time
        inTurn(() => answer(name, grade, event.detail > 0));
      });
    });
    group.addEventListener("focusin", () => shown && current !== name && attend(name));
    $("questions").append(group);
  });
}

async function start() {
  try {
    const told = await (await ask("start")).json();
    progress = told.progress;
    if (!rubric.length) {
      rubric = told.rubric;
      layOut();
    }
    go(told.next_left);
  } catch (error) {
    notice(error.message);
  }
}

window.addEventListener("hashchange", () => progress && show());
new ResizeObserver(() => {
  fit();
  if (current) $(`question-${current}`).scrollIntoView({ block: "nearest" });
}).observe($("stage"));
start();
