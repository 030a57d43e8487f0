// Makes the page's charts interactive: values at the pointer, and what the controls choose. Asks no server.

const charts = JSON.parse(document.getElementById("charts").textContent);
const controls = document.getElementById("controls");
const plots = [...document.querySelectorAll(".plot")];

async function loadVega() {
  const base64 = document.getElementById("vega").textContent;
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

function chosen(chart) {
  const spec = { ...structuredClone(chart), width: "container" };
  if (!spec.layer) return spec; // bars
  const { x, y, smoothing } = Object.fromEntries(new FormData(controls));
  const hiddenRuns = [...controls.querySelectorAll("[name=run]:not(:checked)")].map((box) => box.value);
  const isHidden = (series) => hiddenRuns.includes(series.run);
  const hiddenLabels = spec.data.values.filter(isHidden).map((series) => series.label);
  spec.data.values = spec.data.values.filter((series) => !isHidden(series));
  const { legend, scale } = spec.encoding.color;
  if (legend) legend.values = scale.domain.filter((label) => !hiddenLabels.includes(label));
  spec.transform.push({ calculate: "datum.step * datum.batch_tokens", as: "tokens" });
  Object.assign(spec.encoding.x, { field: x, title: x });
  if (y == "log") {
    spec.transform.push({ filter: "datum.value > 0" });
    spec.encoding.y.scale = { type: "log", nice: false };
  }
  if (smoothing > 0) {
    const means = [{ op: "mean", field: "value", as: "mean" }];
    spec.transform.push(
      { calculate: "datum.value", as: "unsmoothed" },
      { window: means, frame: [-smoothing, +smoothing], groupby: ["label"], sort: [{ field: "step" }] },
      { calculate: "datum.shape == 'stroke' ? datum.mean : datum.value", as: "value" },
    );
    spec.layer.unshift({ mark: { type: "line", strokeWidth: 1, opacity: 0.3 }, encoding: { y: { field: "unsmoothed" } } });
  }
  const pointer = { param: "pointer", empty: false };
  const nearest = { type: "point", encodings: ["x"], nearest: true, on: "pointerover", clear: "pointerout" };
  spec.layer.push(
    { transform: [{ filter: pointer }], mark: { type: "point", filled: true, opacity: 1, size: 50 } },
    {
      transform: [{ aggregate: [{ op: "count" }], groupby: [x] }],
      params: [{ name: "pointer", select: nearest }],
      mark: { type: "rule", tooltip: { content: "data" } },
      encoding: { y: null, color: { value: "currentColor" }, opacity: { condition: { ...pointer, value: 0.5 }, value: 0 } },
    },
  );
  return spec;
}

// A table of each series' value at the pointer's place, or at its nearest point within 1 % of the axis.
function valuesAt({ step, tokens }, escape, rows) {
  const [name, place] = tokens === undefined ? ["step", step] : ["tokens", tokens];
  const places = rows.map((row) => row.step.map((at) => (name == "step" ? at : at * row.batch_tokens)));
  const reach = Math.max(...places.flat()) / 100;
  const shown = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });
  const lines = rows.map(({ colour, label, value, error }, number) => {
    const distances = places[number].map((at) => Math.abs(at - place));
    const nearest = Math.min(...distances);
    if (nearest > reach) return "";
    const index = distances.indexOf(nearest);
    const text = shown(value[index]) + (error[index] ? ` ± ${shown(error[index])}` : "");
    return `<tr><td style="color: ${colour}">●</td><td>${escape(label)}</td><td class="number">${text}</td></tr>`;
  });
  return `<b>${name} ${place.toLocaleString("en")}</b><table>${lines.join("")}</table>`;
}

function count({ name, ...counts }, escape) {
  const [[unit, number]] = Object.entries(counts);
  return `<b>${escape(name)}</b><br>${number.toLocaleString("en")} ${unit}`;
}

// A finger does not hover: a tap or a horizontal drag shows the values, until the next tap.
function followTouch(plot) {
  const onTouch = (type, act, ...options) =>
    plot.addEventListener(type, (event) => event.pointerType == "touch" && act(event), ...options);
  onTouch("pointerdown", (event) => {
    event.target.releasePointerCapture(event.pointerId);
    event.target.dispatchEvent(new PointerEvent("pointermove", event));
  });
  onTouch("pointerout", (event) => event.buttons || event.stopPropagation(), true);
}

function hideValues() {
  document.getElementById("vg-tooltip-element")?.classList.remove("visible");
}

let stale = false;
let drawing = false;

async function draw() {
  stale = true;
  if (drawing) return; // the loop below draws again
  drawing = true;
  while (stale) {
    stale = false;
    for (const plot of plots) {
      const chart = charts[plot.dataset.title];
      const spec = chosen(chart);
      const formatTooltip = (datum, escape) => (spec.layer ? valuesAt : count)(datum, escape, spec.data.values);
      plot.style.minHeight = `${plot.offsetHeight}px`; // so that the page does not jump
      plot.view?.finalize();
      plot.view = await vegaEmbed(plot, spec, { ast: true, actions: false, logLevel: 1, renderer: "svg", tooltip: { formatTooltip } });
      plot.style.minHeight = "";
    }
  }
  drawing = false;
}

function offerDownload() {
  const link = controls.querySelector("[download]");
  const numbers = Object.entries(charts).map(([title, chart]) => [title, chart.data.values]);
  const text = JSON.stringify(Object.fromEntries(numbers), null, 1);
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
}

function showOneStep(slider) {
  const steps = [...slider.closest("section").querySelectorAll("details")].reverse(); // the newest is last
  const show = () => steps.forEach((step, index) => Object.assign(step, { open: true, hidden: index != slider.value }));
  slider.addEventListener("input", show);
  slider.labels[0].hidden = false;
  show();
}

document.querySelectorAll("input.step").forEach(showOneStep);
if (plots.length && window.DecompressionStream) {
  await loadVega();
  offerDownload();
  controls.hidden = false;
  controls.addEventListener("input", draw);
  addEventListener("pointerdown", hideValues, true);
  plots.forEach(followTouch);
  await draw();
}
