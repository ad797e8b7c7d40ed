"use strict";
const link = document.getElementById("link");
const source = new EventSource("events");
source.onopen = () => (link.textContent = "live");
source.onmessage = (event) => {
  for (const [id, html] of Object.entries(JSON.parse(event.data))) {
    const part = document.getElementById(id);
    if (id === "title") document.title = html;
    else if (part) part.innerHTML = html;
  }
};
source.addEventListener("over", () => {
  source.close();
  link.textContent = "the run has ended; this is its last state";
});
source.onerror = () => (link.textContent = "no answer; this is the last state that was heard of");
