// What happens on a click: tables are sorted, samples filtered, pictures swapped and enlarged. Without it all can be read.
"use strict";
document.documentElement.classList.add("js");
const all = (which, within = document) => [...within.querySelectorAll(which)];
const one = (which) => document.querySelector(which);
const button = (text, name) => Object.assign(document.createElement("button"), {type: "button", className: name, textContent: text});

// A drawing that is shown is not on the page a second time: its link takes the picture's own address.
for (const link of all("[data-of]")) {
  link.href = link.closest("figure").querySelector("img").src;
  link.hidden = false;
}

// Tables: a click on a head sorts up, then down, then as it was. What has no value comes last.
function sorter(table, head, column) {
  const body = table.tBodies[0], rows = [...body.rows], numeric = head.classList.contains("number");
  const value = (row) => {
    const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent;
    return !numeric ? text : text === "" ? NaN : Number(text.replaceAll(",", "").replace("−", "-"));
  };
  const absent = (v) => v === "" || Number.isNaN(v);
  return () => {
    const next = {ascending: "descending", descending: null}[head.getAttribute("aria-sort") ?? ""];
    const order = next === undefined ? "ascending" : next;
    for (const other of all("th", table)) other.removeAttribute("aria-sort");
    if (order) head.setAttribute("aria-sort", order);
    const sign = order === "descending" ? -1 : 1;
    const compared = (a, b) => numeric ? a - b || 0 : a.localeCompare(b, "en", {numeric: true});
    const sorted = !order ? rows : [...rows].sort((r, s) => {
      const a = value(r), b = value(s);
      return absent(a) || absent(b) ? absent(a) - absent(b) : sign * compared(a, b);
    });
    body.append(...sorted);
  };
}
for (const table of all("table.numbers")) {
  all("th", table).forEach((head, column) => {
    const press = button(head.textContent, "");
    head.replaceChildren(press);
    press.addEventListener("click", sorter(table, head, column));
  });
}

// The enlarged picture.
const box = one("#lightbox"), stage = one(".stage");
let opener = null, turn = null;
function enlarge(from, image, text, drawing) {
  opener = from;
  stage.className = drawing ? "stage drawing" : "stage sample";
  stage.replaceChildren(Object.assign(new Image(), {src: image.src, alt: image.alt}));
  one("#lightbox-text").textContent = text;
  for (const name of ["earlier", "later", "swap"]) one("#" + name).hidden = drawing;
  if (!box.open) box.showModal();
  stage.scrollTo(0, 0);
}
one("#close").addEventListener("click", () => box.close());
box.addEventListener("click", (event) => event.target === box && box.close());
box.addEventListener("close", () => { turn = null; opener.focus(); });
for (const figure of all("figure")) {
  const image = figure.querySelector("img"), press = button("", "");
  press.setAttribute("aria-label", `Enlarge: ${image.alt}`);
  image.replaceWith(press);
  press.append(image);
  press.addEventListener("click", () => enlarge(press, image, image.alt, true));
}

// Cards: the picture swaps, the corner enlarges.
const list = one("#cards"), cards = list ? [...list.children] : [];
const visible = () => [...list.children].filter((card) => !card.hidden);
function swap(card) {
  const plain = card.classList.toggle("swapped");
  card.querySelector(".face").setAttribute("aria-pressed", String(!plain));
}
function show(card) {
  const plain = card.classList.contains("swapped"), images = all(".pictures img", card);
  const image = images.find((each) => each.classList.contains(plain ? "plain" : "overlay")) ?? images[0];
  if (!image) return;
  const order = visible(), place = order.indexOf(card);
  const instruction = card.querySelector("p.instruction, .instruction p").textContent;
  turn = (step) => order[place + step] && show(order[place + step]);
  one("#earlier").disabled = place < 1;
  one("#later").disabled = place < 0 || place + 1 >= order.length;
  one("#swap").textContent = plain ? "With its map" : "Plain picture";
  one("#swap").onclick = () => { swap(card); show(card); };
  enlarge(card.querySelector(".enlarge"), image, instruction, false);
}
one("#earlier").addEventListener("click", () => turn(-1));
one("#later").addEventListener("click", () => turn(1));
box.addEventListener("keydown", (event) => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (turn && step) { event.preventDefault(); turn(step); }
});
for (const card of cards.filter((card) => card.querySelector(".pictures"))) {
  const pictures = card.querySelector(".pictures"), face = button("", "face"), corner = button("⤢", "enlarge");
  face.setAttribute("aria-label", `Map over ${card.querySelector(".which bdi").textContent}`);
  face.setAttribute("aria-pressed", "true");
  corner.setAttribute("aria-label", `Enlarge ${card.querySelector(".which bdi").textContent}`);
  face.append(...pictures.childNodes);
  pictures.append(face);
  if (face.querySelector("img")) pictures.append(corner);
  face.addEventListener("click", () => swap(card));
  corner.addEventListener("click", () => show(card));
}

// Filters: kept in the address, so that a view can be shared.
const form = one("#filters");
const fields = form ? [...form.elements].filter((field) => field.name) : [];
const choices = fields.filter((field) => field.tagName === "SELECT" && field.name !== "sort");
const number = (text) => text === "" ? null : Number(text);
const within = (value, from, to) => {
  const low = number(form.elements[from]?.value ?? ""), high = number(form.elements[to]?.value ?? "");
  if (low === null && high === null) return true;
  return value !== null && (low === null || value >= low) && (high === null || value <= high);
};
const measure = (card, name) => number(card.dataset[name] ?? "");
const texts = new Map(cards.map((card) =>
  [card, card.querySelector("p.instruction, .instruction p").textContent.toLocaleLowerCase()]));
function fits(card) {
  const area = measure(card, "area");
  const told = (name, value) => card.dataset[name] === value || (card.dataset[name] ?? "").split("\n").includes(value);
  return choices.every((field) => field.value === "" || told(field.name, field.value)) &&
    within(area === null ? null : 100 * area, "area-from", "area-to") &&
    within(measure(card, "error"), "error-from", "error-to") &&
    texts.get(card).includes(form.elements.text.value.trim().toLocaleLowerCase());
}
function filter() {
  const [, sign, key] = form.elements.sort.value.match(/^(-?)(\w+)$/);
  const rank = (card) => {
    const value = measure(card, key);
    return value === null ? Infinity : sign ? -value : value;
  };
  for (const card of cards) card.hidden = !fits(card);
  // Those that fit come first: the first of them are what is printed.
  list.append(...[...cards].sort((a, b) => a.hidden - b.hidden || rank(a) - rank(b) || a.dataset.order - b.dataset.order));
  const shown = cards.filter((card) => !card.hidden).length;
  one("#count").textContent = `${shown.toLocaleString("en")} of ${cards.length.toLocaleString("en")} shown`;
  one("#none-fits").hidden = shown > 0;
}
function keep() {
  const chosen = fields.filter((field) => field.value !== "" && !(field.name === "sort" && field.selectedIndex === 0));
  const view = new URLSearchParams(chosen.map((field) => [field.name, field.value])).toString();
  if (view || location.hash.includes("=")) history.replaceState(null, "", view ? "#" + view : "#samples");
}
function restore() {
  if (!location.hash.includes("=")) return;
  const view = new URLSearchParams(location.hash.slice(1));
  form.reset();
  for (const field of fields) {
    if (!view.has(field.name)) continue;
    field.value = view.get(field.name);
    if (field.selectedIndex === -1) field.selectedIndex = 0; // a view of another report
  }
  filter();
  one("#samples").scrollIntoView();
}
if (form) {
  form.hidden = false;
  const apply = () => { filter(); keep(); };
  for (const event of ["input", "change"]) form.addEventListener(event, apply); // a choice from a list may be but a change
  form.querySelector("button").addEventListener("click", () => { form.reset(); apply(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", restore);
  filter();
  restore();
}
