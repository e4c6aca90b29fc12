// What every page of local_page.py has: asking the command, a notice in the place of a picture, a line of what was done.
"use strict";

const $ = (id) => document.getElementById(id);

async function ask(path, body) {
  const sent = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...sent });
  } catch {
    throw new Error("The command does not answer; all that was confirmed is kept. Start it again and open the address it prints.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({ error: answer.statusText }));
  throw new Error(told.error);
}

function notice(text) {
  $("notice").hidden = text === null;
  $("notice").textContent = text ?? "";
}

function say(text, bad = false) {
  $("said").textContent = text;
  $("said").classList.toggle("bad", bad);
}

const pictures = new Map(); // name → promise of an object URL

// The picture at pictures/name; `kept` of them stay at hand.
function pictureOf(name, kept) {
  if (!pictures.has(name)) {
    const found = ask(`pictures/${name}`).then(async (answer) => URL.createObjectURL(await answer.blob()));
    found.catch(() => pictures.delete(name)); // asked again next time
    pictures.set(name, found);
    if (pictures.size > kept) {
      const [oldest, old] = pictures.entries().next().value;
      pictures.delete(oldest);
      old.then(URL.revokeObjectURL, () => {});
    }
  }
  return pictures.get(name);
}

// Show what the address names: a place, counted from one, or the end. The browser's own back and forward work, too.
function go(place) {
  const hash = place === null ? "#end" : `#${place + 1}`;
  if (location.hash === hash) return show();
  location.hash = hash;
}
