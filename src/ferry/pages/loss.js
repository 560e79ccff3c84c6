"use strict";
// Draws the charts of the page from the numbers in it, and redraws them as the reader smooths, zooms and points.

const LEFT = 58, RIGHT = 10, TOP = 10, BOTTOM = 24;
const NUM_COLOURS = 6;

function smooth(values, weight) {
  // The exponential moving average without the pull towards zero at the start.
  let mean = 0, trust = 0;
  return values.map((value) => {
    if (value !== null) {
      mean = weight * mean + (1 - weight) * value;
      trust = weight * trust + (1 - weight);
    }
    return trust ? mean / trust : null;
  });
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= rough * 0.7);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index <= high / step + 1e-9; index++) found.push(index * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  return found.length >= 3 ? found : ticks(low, high, 5);
}

function thin(points, numBuckets) {
  // The lowest and the highest point of each stretch: peaks stay.
  if (points.length <= 2 * numBuckets) return points;
  const kept = [];
  for (let bucket = 0; bucket < numBuckets; bucket++) {
    const start = Math.floor((bucket * points.length) / numBuckets);
    const end = Math.floor(((bucket + 1) * points.length) / numBuckets);
    let least = start, most = start;
    for (let i = start; i < end; i++) {
      if (points[i][1] === null) continue;
      if (points[least][1] === null || points[i][1] < points[least][1]) least = i;
      if (points[most][1] === null || points[i][1] > points[most][1]) most = i;
    }
    kept.push(points[Math.min(least, most)]);
    if (least !== most) kept.push(points[Math.max(least, most)]);
  }
  return kept;
}

function nearest(steps, wanted) {
  // The index of the step next to the wanted one; steps ascend.
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - steps[low - 1] < steps[low] - wanted ? low - 1 : low;
}

function numberText(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "loss") return value.toFixed(4);
  if (unit === "share") return `${(100 * value).toFixed(1)} %`;
  if (unit === "bytes") {
    const [scale, word] = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([size]) => value >= size) || [1, "B"];
    return `${+(value / scale).toPrecision(4)} ${word}`;
  }
  if (unit === "count") return Math.round(value).toLocaleString("en");
  return value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function tickText(value, unit) {
  if (unit === "share") return `${+(100 * value).toPrecision(3)} %`;
  if (unit === "bytes" || unit === "count") return value === 0 ? "0" : numberText(value, unit);
  if (value !== 0 && Math.abs(value) < 1e-3) return (+value.toPrecision(3)).toExponential();
  return String(+value.toPrecision(6));
}

function start() {
  document.documentElement.classList.add("scripted");
  const all = JSON.parse(document.getElementById("data").textContent);
  all.forEach((run, index) => { run.colour = `m${index % NUM_COLOURS}`; run.shown = true; });
  const runs = all.filter((run) => run.step.length);
  if (!runs.length) return;
  const whole = [Math.min(...runs.map((run) => run.step[0])), Math.max(...runs.map((run) => run.step.at(-1)))];
  if (whole[0] === whole[1]) whole[1] += 1;
  const state = { from: whole[0], to: whole[1], weight: 0, log: false, step: null };
  const charts = [...document.querySelectorAll(".chart")].map((node) => ({
    node, plot: node.querySelector(".plot"), readout: node.querySelector(".readout"),
    key: node.dataset.key, unit: node.dataset.unit, isLoss: node.dataset.key === "loss",
  }));

  function frameOf(chart) {
    const width = Math.max(chart.plot.clientWidth, 200);
    const height = chart.isLoss ? Math.max(240, Math.min(380, width * 0.6)) : 170;
    const values = [];
    for (const run of runs.filter((one) => one.shown)) {
      run[chart.key].forEach((value, i) => {
        if (value !== null && run.step[i] >= state.from && run.step[i] <= state.to) values.push(value);
      });
      if (chart.isLoss)
        for (const [step, value] of run.validation)
          if (value !== null && step >= state.from && step <= state.to) values.push(value);
    }
    const isLog = chart.isLoss && state.log && values.every((value) => value > 0);
    let low = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0;
    let high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
    if (!chart.isLoss) low = Math.min(low, 0);
    if (low === high) { low = isLog ? low / 2 : low - 0.5; high = isLog ? high * 2 : high + 0.5; }
    if (isLog) {
      const room = (high / low) ** 0.05;
      low /= room; high *= room;
    } else {
      const room = (high - low) * 0.05;
      if (chart.isLoss || low < 0) low -= room;
      high += room;
    }
    const scale = isLog ? Math.log : (value) => value;
    return {
      width, height, low, high, isLog,
      x: (step) => LEFT + ((step - state.from) / (state.to - state.from)) * (width - LEFT - RIGHT),
      y: (value) => height - BOTTOM - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (height - TOP - BOTTOM),
    };
  }

  function path(run, values, frame, style) {
    // One step beyond either edge, so that lines reach the edge.
    let first = nearest(run.step, state.from), last = nearest(run.step, state.to);
    first = Math.max(first - 1, 0); last = Math.min(last + 1, run.step.length - 1);
    const points = [];
    for (let i = first; i <= last; i++) points.push([run.step[i], values[i]]);
    let text = "", isDown = false;
    for (const [step, value] of thin(points, Math.ceil(frame.width))) {
      if (value === null) { isDown = false; continue; }
      text += `${isDown ? "L" : "M"}${frame.x(step).toFixed(1)} ${frame.y(value).toFixed(1)}`;
      isDown = true;
    }
    return text && `<path class="line ${style} ${run.colour}" d="${text}"/>`;
  }

  function axes(frame, unit) {
    const bottom = frame.height - BOTTOM, right = frame.width - RIGHT;
    const rows = frame.isLog ? logTicks(frame.low, frame.high) : ticks(frame.low, frame.high, frame.height > 200 ? 5 : 4);
    let text = "";
    for (const value of rows) {
      const y = frame.y(value).toFixed(1);
      text += `<line class="rule" x1="${LEFT}" x2="${right}" y1="${y}" y2="${y}"/>`;
      text += `<text class="tick" text-anchor="end" x="${LEFT - 8}" y="${+y + 4}">${tickText(value, unit)}</text>`;
    }
    const columns = ticks(state.from, state.to, Math.max(Math.floor(frame.width / 80), 2)).filter(Number.isInteger);
    for (const value of columns)
      text += `<text class="tick" text-anchor="middle" x="${Math.min(frame.x(value), right - 8).toFixed(1)}" y="${bottom + 17}">${value}</text>`;
    return text;
  }

  function marks(frame) {
    if (runs.length > 1) return "";
    const withCheckpoints = frame.height > 200;
    const bottom = frame.height - BOTTOM;
    return runs[0].marks
      .filter(([step, kind]) => step >= state.from && step <= state.to && (withCheckpoints || kind !== "saved"))
      .map(([step, kind]) => {
        const x = frame.x(step).toFixed(1);
        return `<line class="mark ${kind}" x1="${x}" x2="${x}" y1="${kind === "saved" ? bottom - 7 : TOP}" y2="${bottom}"/>`;
      }).join("");
  }

  function draw(chart) {
    const frame = (chart.frame = frameOf(chart));
    const shown = runs.filter((run) => run.shown);
    let lines = "", dots = "";
    for (const run of shown) {
      lines += path(run, run[chart.key], frame, chart.isLoss && state.weight > 0 ? "raw" : "");
    }
    if (chart.isLoss) {
      for (const run of shown) {
        if (state.weight > 0) lines += path(run, run.smoothed, frame, "");
        for (const [step, value] of run.validation)
          if (value !== null && step >= state.from && step <= state.to)
            dots += `<circle class="dot ${run.colour}" cx="${frame.x(step).toFixed(1)}" cy="${frame.y(value).toFixed(1)}" r="4"/>`;
      }
    }
    const clip = `clip-${chart.key}`;
    chart.plot.innerHTML =
      `<svg viewBox="0 0 ${frame.width} ${frame.height}" role="img" aria-label="${chart.key} by step">` +
      `<clipPath id="${clip}"><rect x="${LEFT}" y="${TOP - 4}" width="${frame.width - LEFT - RIGHT}" height="${frame.height - TOP - BOTTOM + 8}"/></clipPath>` +
      `${axes(frame, chart.unit)}${marks(frame)}<g clip-path="url(#${clip})">${lines}</g>${dots}<g class="overlay"></g></svg>`;
    point(chart);
  }

  function point(chart, choice = null) {
    // What moves with the pointer: a line, a spot on each curve, the values in words, the stretch being chosen.
    const frame = chart.frame;
    const bottom = frame.height - BOTTOM;
    let text = "";
    if (choice) {
      const [a, b] = choice[0] < choice[1] ? choice : [choice[1], choice[0]];
      text += `<rect class="choice" x="${a}" width="${b - a}" y="${TOP}" height="${bottom - TOP}"/>`;
    }
    const wanted = state.step === null ? state.to : state.step;
    const words = [];
    for (const run of runs.filter((one) => one.shown)) {
      const i = nearest(run.step, wanted);
      const isThere = state.step === null || (wanted > run.step[0] - 1 && wanted < run.step.at(-1) + 1);
      const value = isThere ? run[chart.key][i] : null;
      if (!words.length) words.push([`step ${state.step === null ? run.step[i] : Math.round(state.step)}`, "", ""]);
      words.push([runs.length > 1 && chart.isLoss ? run.name : "", numberText(value, chart.unit), run.colour]);
      if (chart.isLoss && state.weight > 0 && runs.length === 1) words.push(["smoothed", numberText(run.smoothed[i], "loss"), run.colour]);
      if (chart.isLoss && runs.length === 1) words.push(...beside(run, run.step[i]));
      if (state.step !== null && value !== null && run.step[i] >= state.from && run.step[i] <= state.to) {
        const x = frame.x(run.step[i]).toFixed(1);
        text += `<line class="pointer" x1="${x}" x2="${x}" y1="${TOP}" y2="${bottom}"/>`;
        text += `<circle class="spot ${run.colour}" cx="${x}" cy="${frame.y(value).toFixed(1)}" r="4"/>`;
      }
    }
    chart.plot.querySelector(".overlay").innerHTML = text;
    chart.readout.replaceChildren(...words.map(([name, value, colour]) => {
      const item = document.createElement("span"), number = document.createElement("b");
      number.textContent = value;
      number.className = runs.length > 1 ? colour : "";
      item.append(name && value ? `${name} ` : name, number);
      return item;
    }));
  }

  function beside(run, step) {
    const found = run.validation.filter(([at]) => at === step).map(([, value]) => ["validation", numberText(value, "loss"), run.colour]);
    if (state.step === null) return found;
    return [...found, ...run.marks.filter(([at]) => at === step).map(([, kind]) => [kind === "saved" ? "checkpoint" : kind, "", ""])];
  }

  function drawAll() {
    charts.forEach(draw);
    document.getElementById("reset").disabled = state.from === whole[0] && state.to === whole[1];
  }

  function pointAll(step) {
    state.step = step;
    charts.forEach((chart) => point(chart));
  }

  function zoom(from, to) {
    if (to - from < 1) return;
    [state.from, state.to] = [from, to];
    drawAll();
  }

  function setSmoothing(weight) {
    state.weight = weight;
    document.getElementById("weight").value = weight.toFixed(2);
    for (const run of runs) run.smoothed = smooth(run.loss, weight);
  }

  for (const chart of charts) {
    let startX = null;
    const across = (event) => {
      const box = chart.plot.getBoundingClientRect();
      return Math.min(Math.max(event.clientX - box.left, LEFT), chart.frame.width - RIGHT);
    };
    const stepAt = (x) => state.from + ((x - LEFT) / (chart.frame.width - LEFT - RIGHT)) * (state.to - state.from);
    chart.plot.tabIndex = 0;
    chart.plot.addEventListener("pointerdown", (event) => {
      startX = across(event);
      chart.plot.setPointerCapture(event.pointerId);
    });
    chart.plot.addEventListener("pointermove", (event) => {
      const x = across(event);
      pointAll(stepAt(x));
      if (startX !== null) point(chart, [startX, x]);
    });
    chart.plot.addEventListener("pointerup", (event) => {
      const x = across(event), began = startX;
      startX = null;
      if (began !== null && Math.abs(x - began) > 6) zoom(stepAt(Math.min(x, began)), stepAt(Math.max(x, began)));
      else pointAll(state.step);
    });
    chart.plot.addEventListener("pointercancel", () => { startX = null; pointAll(null); });
    chart.plot.addEventListener("pointerleave", () => { if (startX === null) pointAll(null); });
    chart.plot.addEventListener("dblclick", () => zoom(...whole));
    chart.plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") zoom(...whole);
      if (!move) return;
      event.preventDefault();
      const steps = runs[0].step, at = nearest(steps, state.step === null ? state.to : state.step);
      pointAll(steps[Math.min(Math.max(at + move, 0), steps.length - 1)]);
    });
  }
  document.getElementById("smoothing").addEventListener("input", (event) => {
    setSmoothing(+event.target.value);
    charts.filter((chart) => chart.isLoss).forEach(draw);
  });
  document.getElementById("log").addEventListener("change", (event) => {
    state.log = event.target.checked;
    charts.filter((chart) => chart.isLoss).forEach(draw);
  });
  document.getElementById("reset").addEventListener("click", () => zoom(...whole));
  for (const box of document.querySelectorAll("[data-run]"))
    box.addEventListener("change", () => { all[+box.dataset.run].shown = box.checked; drawAll(); });
  let width = 0;
  new ResizeObserver(() => {
    if (width !== document.body.clientWidth) { width = document.body.clientWidth; drawAll(); }
  }).observe(document.body);
  setSmoothing(+document.getElementById("smoothing").value);
  drawAll();
}

if (typeof document !== "undefined") start();
