// Refreshes the figures of the operator's page. Without this script the page is complete, and a reload
// shows new figures.
"use strict";

const EVERY_MS = 2000;
const pause = document.getElementById("pause");
let paused = false;

// Sets a text only if it has changed, so that a screen reader does not repeat the status.
function say(id, text) {
  const element = document.getElementById(id);
  if (element && element.textContent !== text) element.textContent = text;
}

function show(figures) {
  for (const [id, text] of Object.entries(figures.text)) say(id, text);
  for (const [id, path] of Object.entries(figures.paths)) {
    document.getElementById(id)?.setAttribute("d", path);
  }
  document.getElementById("state").dataset.level = figures.level;
}

async function renew() {
  if (!paused && !document.hidden) {
    try {
      const answer = await fetch("/operator/figures", { signal: AbortSignal.timeout(5000) });
      if (!answer.ok) throw new Error(answer.statusText);
      const figures = await answer.json();
      if (!paused) show(figures);
    } catch {
      say("state", "This app does not answer; the figures are old");
      document.getElementById("state").dataset.level = "down";
    }
  }
  setTimeout(renew, EVERY_MS);
}

// A user can pause content that changes by itself.
pause.hidden = false;
pause.addEventListener("click", () => {
  paused = !paused;
  pause.textContent = paused ? "Go on" : "Pause";
});
document.body.dataset.live = "yes";
renew();
