// The token under the pointer, and the head that is shown.
(() => {
  const data = JSON.parse(document.getElementById("hover").textContent);
  const strip = document.querySelector(".strip");
  const cursor = strip.querySelector(".cursor");
  const tokens = [...strip.querySelectorAll(".token")];
  const panels = [...strip.querySelectorAll(".panel")];
  const readout = document.getElementById("readout");
  let head = data.panels[0].head;
  let current = 0;

  const life = (x) => (x >= 1e5 ? "> 100,000" : x >= 100 ? Math.round(x).toLocaleString("en") : String(x));

  function show(index) {
    current = index;
    cursor.style.left = `${tokens[index].offsetLeft}px`;
    readout.querySelector(".what").textContent = data.tokens[index];
    readout.querySelector(".where").textContent = `token ${index} of ${data.tokens.length}, head ${head}; half-lives in tokens`;
    for (const panel of data.panels.filter((p) => p.head === head)) {
      const row = readout.querySelector(`tr[data-layer="${panel.layer}"]`);
      const [fast, median, slow] = panel.lives[index];
      row.querySelector(".forgotten").textContent = `${(100 * panel.forgotten[index]).toFixed(1)} %`;
      row.querySelector(".beta").textContent = panel.beta[index].toFixed(3);
      row.querySelector(".correction").textContent = panel.correction[index].toPrecision(3);
      row.querySelector(".share").textContent = `${Math.round((100 * panel.correction[index]) / (panel.value[index] || 1))} %`;
      row.querySelector(".fast").textContent = life(fast);
      row.querySelector(".median").textContent = life(median);
      row.querySelector(".slow").textContent = life(slow);
    }
  }

  function follow(event) {
    const x = event.clientX - tokens[0].getBoundingClientRect().left;
    const index = Math.floor(x / tokens[0].offsetWidth);
    if (index >= 0 && index < tokens.length) show(index);
  }
  strip.addEventListener("pointermove", follow);
  strip.addEventListener("pointerdown", follow);
  strip.parentElement.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(current + step, 0), tokens.length - 1));
    tokens[current].scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  for (const button of document.querySelectorAll(".heads button")) {
    button.addEventListener("click", () => {
      head = Number(button.dataset.head);
      for (const other of document.querySelectorAll(".heads button")) other.setAttribute("aria-pressed", String(other === button));
      for (const panel of panels) panel.hidden = Number(panel.dataset.head) !== head;
      show(current);
    });
  }
  // Begin at the largest correction once the memory holds something, so that the picture explains itself.
  const first = data.panels.filter((p) => p.head === head).at(-1).correction;
  const start = Math.floor(first.length / 4);
  const surprise = first.indexOf(Math.max(...first.slice(start)), start);
  show(surprise);
  const scroller = strip.parentElement;
  if (scroller.scrollWidth > scroller.clientWidth) scroller.scrollLeft = tokens[surprise].offsetLeft - scroller.clientWidth / 2;
})();
