"use strict";
(() => {
  const data = globalThis.reviewData;
  const { cases, structures } = data;
  const byId = (id) => document.getElementById(id);

  const COLUMNS = [
    { key: "dice", title: "Dice", digits: 3, worst: "low", bar: true },
    { key: "surface_dice", title: "Surface Dice", digits: 3, worst: "low", bar: true },
    { key: "hd95_mm", title: "HD95 mm", digits: 1, worst: "high" },
    { key: "prediction_ml", title: "Volume ml", digits: 1, worst: "high" },
    { key: "reference_ml", title: "Reference ml", digits: 1, worst: "high" },
  ];
  const QUALITY = { key: "quality", title: "Quality", digits: 2, worst: "low" };
  const FLAGS = { key: "flags", title: "Flags", worst: "high" };
  const MARKS = ["missed", "invented", "absent"];
  const SHOW = ["Scan", "Reference", "Prediction", "Both", "Difference"];
  const VIEWS = ["Axial", "Coronal", "Sagittal", "All"]; // in the order of NiiVue's slice types
  const AXES = { Axial: 2, Coronal: 1, Sagittal: 0 };
  const DIFFERENCES = [
    ["agreement", "#9a9a9a"],
    ["missed: in the reference only", "#56b4e9"],
    ["extra: in the prediction only", "#e69f00"],
    ["another structure", "#cc79a7"],
  ];

  const state = {
    structure: -1, // -1: all of them
    sort: { key: "name", worst: false },
    order: [], // indices of cases as the table shows them
    open: -1,
    hidden: new Set(),
    show: "Both",
    view: "All",
  };
  let viewer = null; // { nv, scan, reference, prediction, fill, line } once a case is open
  let niivue = null;

  // Elements. Text only ever enters the page as text.

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function swatch(colour) {
    const made = element("span", { className: "swatch" });
    made.style.background = colour;
    return made;
  }

  function number(value, digits) {
    return Number.isFinite(value) ? value.toFixed(digits) : "–";
  }

  function list(target, pairs) {
    const item = ([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value));
    target.replaceChildren(...pairs.map(item));
  }

  /** A figure with a bar below it. */
  function bar(cell, part) {
    if (!Number.isFinite(part)) return;
    cell.classList.add("bar-cell");
    cell.style.setProperty("--part", part);
  }

  /** A table of figures; its first column names the rows. */
  function table({ title, note, columns, rows }) {
    const heading = (text, k) => element("th", { scope: "col", className: k ? "number" : "" }, text);
    const figure = ({ text, part, best }, k) => {
      const made = k ? element("td", { className: "number" }) : element("th", { scope: "row" });
      made.append(best ? element("strong", {}, text) : text);
      bar(made, part);
      return made;
    };
    const head = element("thead", {}, element("tr", {}, ...columns.map(heading)));
    const body = element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map(figure))));
    const made = element("section", {}, element("h2", {}, title));
    made.append(element("div", { className: "wide", tabIndex: 0 }, element("table", {}, head, body)));
    if (note) made.append(element("p", { className: "quiet" }, note));
    return made;
  }

  // The table of cases.

  function figure(one, key) {
    if (key === "quality") return one.quality;
    if (key === "flags") return flags(one).length;
    if (key === "name") return one.name;
    if (state.structure >= 0) return one.scores[structures[state.structure].name]?.[key];
    const values = Object.values(one.scores).map((scores) => scores[key]).filter(Number.isFinite);
    if (!values.length) return NaN;
    const sum = values.reduce((a, b) => a + b);
    return key.endsWith("_ml") ? sum : sum / values.length;
  }

  function flags(one) {
    const chosen = state.structure < 0 ? structures : [structures[state.structure]];
    const marks = ({ name }) => MARKS.filter((mark) => one.scores[name]?.[mark]).map((mark) => `${name} ${mark}`);
    return [...one.problems, ...one.flags, ...chosen.flatMap(marks)];
  }

  const columns = [...COLUMNS, QUALITY].filter(({ key }) => cases.some((one) => Number.isFinite(figure(one, key))));
  if (cases.some((one) => flags(one).length)) columns.push(FLAGS);

  function sorted() {
    const { key, worst } = state.sort;
    const column = columns.find((each) => each.key === key);
    const sign = (column?.worst === "high") === worst ? -1 : 1;
    const name = (i) => cases[i].name;
    const byName = (a, b) => name(a).localeCompare(name(b), "en", { numeric: true });
    if (!column) return [...cases.keys()].sort((a, b) => (worst ? -1 : 1) * byName(a, b));
    // Without a figure: a case in which something failed counts as worst, any other comes last.
    const rank = (i) => (Number.isFinite(figure(cases[i], key)) ? 0 : cases[i].problems.length && worst ? -1 : 1);
    const byFigure = (a, b) => rank(a) === 0 && sign * (figure(cases[a], key) - figure(cases[b], key));
    return [...cases.keys()].sort((a, b) => rank(a) - rank(b) || byFigure(a, b) || byName(a, b));
  }

  function fillTable() {
    state.order = sorted();
    const head = element("tr");
    for (const column of [{ key: "name", title: "Case" }, ...columns]) {
      const button = element("button", { type: "button", textContent: column.title });
      button.onclick = () => sortBy(column.key);
      const cell = element("th", { scope: "col", className: column.digits ? "number" : "" }, button);
      cell.dataset.key = column.key;
      if (state.sort.key === column.key) {
        const high = column.key === "name" ? state.sort.worst : (column.worst === "high") === state.sort.worst;
        cell.setAttribute("aria-sort", high ? "descending" : "ascending");
      }
      head.append(cell);
    }
    byId("table").tHead.replaceChildren(head);
    byId("table").tBodies[0].replaceChildren(...state.order.map(row));
  }

  function row(index) {
    const one = cases[index];
    const button = element("button", { type: "button", className: "case", textContent: one.name, title: one.name });
    const made = element("tr", {}, element("th", { scope: "row" }, button));
    made.dataset.index = index;
    if (index === state.open) made.setAttribute("aria-current", "true");
    made.onclick = () => open(index);
    for (const column of columns) {
      const cell = element("td", { className: column.digits ? "number" : "flags" });
      if (column === FLAGS) {
        cell.append(...flags(one).map((flag) => element("span", { className: "flag", title: flag }, flag)));
      } else {
        const value = figure(one, column.key);
        cell.textContent = number(value, column.digits);
        if (column.bar) bar(cell, value);
      }
      made.append(cell);
    }
    return made;
  }

  function sortBy(key) {
    const same = state.sort.key === key;
    state.sort = { key, worst: same ? !state.sort.worst : key !== "name" };
    fillTable();
    byId("table").tHead.querySelector(`[data-key="${key}"] button`).focus();
  }

  function chooseStructure(index) {
    state.structure = index;
    byId("structure").value = index;
    byId("meaning").hidden = index >= 0;
    fillTable();
    if (state.open >= 0) {
      fillStructures();
      goToOrgan();
    }
  }

  // The viewer.

  const receivers = new Map();
  globalThis.review = { receive: (name, base64) => receivers.get(name)?.(base64) };

  /** A volume comes as a script, since a page on disk may not fetch files. */
  async function load(name) {
    const script = element("script", { src: `volumes/${name}.js` });
    const base64 = await new Promise((resolve, reject) => {
      receivers.set(name, resolve);
      script.onerror = () => reject(new Error(`volumes/${name}.js is missing or damaged`));
      document.head.append(script);
    });
    receivers.delete(name);
    script.remove();
    return globalThis.niivue.NVImage.loadFromBase64({ name: `${name}.nii.gz`, base64 });
  }

  async function start() {
    const canvas = byId("canvas");
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error("the viewer needs WebGL2, which this browser lacks");
    }
    const nv = new globalThis.niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.45, 0.6, 0.72, 1],
      crosshairWidthUnit: "percent",
      crosshairWidth: 0.25,
      crosshairGap: 40, // times half the width: the organ in the middle stays free
      isCornerOrientationText: true,
      fontColor: [0.75, 0.75, 0.75, 1],
      isRadiologicalConvention: true,
      multiplanarShowRender: 0,
      dragAndDropEnabled: false,
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      logLevel: "error",
      loadingText: "",
    });
    await nv.attachToCanvas(canvas);
    nv.onLocationChange = showPlace;
    nv.onIntensityChange = showWindow;
    return nv;
  }

  async function open(index) {
    const one = cases[index];
    state.open = index;
    for (const each of byId("table").tBodies[0].rows) {
      if (Number(each.dataset.index) === index) {
        each.setAttribute("aria-current", "true");
        each.scrollIntoView({ block: "nearest" });
      } else each.removeAttribute("aria-current");
    }
    byId("open").textContent = one.name;
    byId("problems").textContent = one.problems.join(" ");
    byId("problems").hidden = !one.problems.length;
    byId("reduced").textContent = one.reduced ?? "";
    byId("reduced").hidden = !one.reduced;
    fillStructures();
    // Until its volumes are there nothing is to be seen, least of all the case before.
    setViewer(null);
    byId("status").textContent = "loading";
    try {
      niivue ??= start();
      const nv = await niivue;
      const roles = Object.entries(one.volumes);
      const images = Object.fromEntries(await Promise.all(roles.map(async ([role, name]) => [role, await load(name)])));
      if (state.open !== index) return; // another case was opened meanwhile
      for (const volume of [...nv.volumes].reverse()) nv.removeVolume(volume);
      if (images.scan) show(nv, images, one);
      byId("status").textContent = images.scan ? "" : "no scan to show";
    } catch (error) {
      if (state.open === index) byId("status").textContent = `not shown: ${error.message}`;
    }
  }

  function show(nv, { scan, reference, prediction }, one) {
    const labels = reference ?? prediction;
    setViewer({ nv, scan, reference, prediction, fill: labels?.clone(), line: labels?.clone() });
    nv.addVolume(scan);
    resetWindow();
    for (const overlay of [viewer.fill, viewer.line]) if (overlay) nv.addVolume(overlay);
    arrange();
    byId("canvas").setAttribute("aria-label", `Slices of ${one.name}`);
    paint();
    goToOrgan();
  }

  /** One plane, or all three with the one that the scan was taken in large. */
  function arrange() {
    const { nv } = viewer;
    nv.setSliceType(VIEWS.indexOf(state.view));
    if (state.view !== "All") return nv.clearCustomLayout();
    const large = 2 - coarsestAxis();
    const [upper, lower] = [0, 1, 2].filter((plane) => plane !== large);
    nv.setCustomLayout([
      { sliceType: large, position: [0, 0, 0.64, 1] },
      { sliceType: upper, position: [0.65, 0, 0.35, 0.495] },
      { sliceType: lower, position: [0.65, 0.505, 0.35, 0.495] },
    ]);
  }

  /** Colours of the codes in an overlay: label values, or the kinds of agreement. */
  function colourTable(differences) {
    const entries = differences
      ? DIFFERENCES.map(([, colour], k) => [k + 1, colour])
      : shownStructures().flatMap(({ codes, colour }) => codes.map((code) => [code, colour]));
    // Of several structures with one code the first has the say.
    const colours = [...new Map([[0, "#000000"], ...entries.reverse()])];
    const part = (start) => colours.map(([, colour]) => parseInt(colour.slice(start, start + 2), 16));
    const codes = colours.map(([code]) => code);
    return { R: part(1), G: part(3), B: part(5), A: codes.map((code) => (code ? 255 : 0)), I: codes };
  }

  function shownStructures() {
    return structures.filter((_, k) => !state.hidden.has(k));
  }

  /** Writes what is to be seen into the two overlays: an area, and above it the outline of the reference. */
  function paint() {
    if (!viewer?.fill) return;
    const { nv, reference, prediction, fill, line } = viewer;
    const visible = new Set(shownStructures().flatMap(({ codes }) => codes));
    const shown = (image) => image?.img.map((code) => (visible.has(code) ? code : 0));
    const a = shown(reference);
    const b = shown(prediction);
    line.img.fill(0);
    fill.img.fill(0);
    if (state.show === "Reference" && a) fill.img.set(a);
    if (state.show === "Prediction" && b) fill.img.set(b);
    if (state.show === "Difference" && a && b) {
      fill.img.forEach((_, k) => {
        fill.img[k] = !a[k] && !b[k] ? 0 : a[k] === b[k] ? 1 : !b[k] ? 2 : !a[k] ? 3 : 4;
      });
    }
    if (state.show === "Both") {
      if (b) fill.img.set(b);
      if (a) outline(a, reference.hdr.dims, axis(), line.img);
    }
    fill.setColormapLabel(colourTable(state.show === "Difference"));
    line.setColormapLabel(colourTable(false));
    fill.opacity = Number(byId("opacity").value);
    line.opacity = 1;
    byId("difference").hidden = state.show !== "Difference";
    refresh();
  }

  /** Draws anew. Between two voxels an intensity is interpolated, a label is not. */
  function refresh() {
    const { nv } = viewer;
    nv.updateGLVolume();
    nv.opts.isNearestInterpolation = true;
    nv.updateInterpolation(1);
    nv.opts.isNearestInterpolation = false;
    nv.drawScene();
  }

  /** The voxels of each label that have a neighbour outside it within the slices across an axis. */
  function outline(labels, dims, across, target) {
    const [, nx, ny, nz] = dims;
    const size = [nx, ny, nz];
    const step = [1, nx, nx * ny];
    const place = [0, 0, 0];
    const along = [0, 1, 2].filter((k) => k !== across);
    for (let k = 0; k < labels.length; k++) {
      if (!labels[k]) continue;
      place[0] = k % nx;
      place[1] = Math.floor(k / nx) % ny;
      place[2] = Math.floor(k / (nx * ny));
      const inside = along.every(
        (d) =>
          place[d] > 0 && labels[k - step[d]] === labels[k] &&
          place[d] < size[d] - 1 && labels[k + step[d]] === labels[k],
      );
      if (!inside) target[k] = labels[k];
    }
  }

  /** The axis that the slice control moves along: across the plane, or of coarsest spacing where all planes show. */
  function axis() {
    return AXES[state.view] ?? coarsestAxis();
  }

  function coarsestAxis() {
    const spacing = viewer.scan.hdr.pixDims.slice(1, 4);
    const coarsest = Math.max(...spacing);
    return spacing[2] * 1.05 > coarsest ? 2 : spacing.indexOf(coarsest);
  }

  /** To the chosen structure; where all are chosen, to the one of lowest Dice. */
  function goToOrgan() {
    if (!viewer) return;
    const one = cases[state.open];
    const dice = ({ name }) => one.scores[name]?.dice ?? NaN;
    const present = structures.filter(({ name }) => one.centres[name]);
    const worst = present.reduce((a, b) => (a && !(dice(b) < dice(a)) ? a : b), null);
    const wanted = state.structure < 0 ? worst : structures[state.structure];
    const centre = wanted && one.centres[wanted.name];
    if (centre) viewer.nv.scene.crosshairPos = viewer.nv.mm2frac(centre, 0, true);
    viewer.nv.drawScene();
    viewer.nv.createOnLocationChange();
  }

  function moveTo(slice) {
    const { nv } = viewer;
    const voxel = [...nv.frac2vox(nv.scene.crosshairPos)];
    voxel[axis()] = Math.min(Math.max(slice, 0), Number(byId("slice").max));
    nv.scene.crosshairPos = nv.vox2frac(voxel);
    nv.drawScene();
    nv.createOnLocationChange();
  }

  function showPlace(location) {
    if (!viewer) return;
    const slider = byId("slice");
    const voxel = [...location.vox];
    slider.max = viewer.scan.hdr.dims[axis() + 1] - 1;
    slider.value = voxel[axis()];
    const named = (image) => {
      const code = image?.getValue(...voxel);
      return structures.filter(({ codes }) => codes.includes(code)).map(({ name }) => name).join(", ") || "–";
    };
    const parts = [
      `${Number(slider.value) + 1} of ${Number(slider.max) + 1}`,
      `${[...location.mm].slice(0, 3).map((mm) => mm.toFixed(1)).join(", ")} mm`,
      `intensity ${Number(viewer.scan.getValue(...voxel).toPrecision(5))}`,
    ];
    if (viewer.reference) parts.push(`reference ${named(viewer.reference)}`);
    if (viewer.prediction) parts.push(`prediction ${named(viewer.prediction)}`);
    byId("place").textContent = parts.join(" · ");
  }

  function showWindow() {
    const shown = (value) => Number(value.toPrecision(4));
    byId("low").value = shown(viewer.scan.cal_min);
    byId("high").value = shown(viewer.scan.cal_max);
  }

  function setWindow(low, high) {
    if (!(viewer && low < high)) return;
    Object.assign(viewer.scan, { cal_min: low, cal_max: high });
    refresh();
  }

  function resetWindow() {
    setWindow(...cases[state.open].window);
    showWindow();
  }

  function choose(kind, value) {
    const radio = document.querySelector(`input[name="${kind}"][value="${value}"]`);
    if (radio.disabled) return;
    radio.checked = true;
    state[kind] = value;
    if (!viewer) return;
    arrange();
    paint();
    viewer.nv.createOnLocationChange();
  }

  /** What cannot be shown cannot be chosen; the choice falls back to what can. */
  function setViewer(next) {
    viewer = next;
    byId("stage").classList.toggle("empty", !viewer);
    if (!viewer) byId("place").textContent = "";
    const has = { Scan: true, Reference: viewer?.reference, Prediction: viewer?.prediction };
    has.Both = has.Difference = has.Reference && has.Prediction;
    for (const radio of document.querySelectorAll("#show input")) radio.disabled = !viewer || !has[radio.value];
    const others = document.querySelectorAll("#view input, #slice, #low, #high, #reset, #opacity");
    for (const control of others) control.disabled = !viewer;
    if (!viewer || has[state.show]) return;
    state.show = ["Prediction", "Reference", "Scan"].find((each) => has[each]);
    document.querySelector(`#show input[value="${state.show}"]`).checked = true;
  }

  /** The open case, structure by structure. */
  function fillStructures() {
    const one = cases[state.open];
    const shown = COLUMNS.filter((column) => columns.includes(column));
    const head = element("tr", {}, element("th", { scope: "col", textContent: "Structure" }));
    for (const { title } of shown) head.append(element("th", { scope: "col", className: "number" }, title));
    const rows = structures.map(({ name, colour }, k) => {
      const box = element("input", { type: "checkbox", checked: !state.hidden.has(k), ariaLabel: `Show ${name}` });
      box.onchange = () => {
        if (box.checked) state.hidden.delete(k);
        else state.hidden.add(k);
        paint();
      };
      const button = element("button", { type: "button", textContent: name, title: `Go to ${name}` });
      button.onclick = () => chooseStructure(k);
      const made = element("tr", {}, element("th", { scope: "row" }, box, swatch(colour), button));
      if (k === state.structure) made.setAttribute("aria-current", "true");
      for (const { key, digits } of shown) {
        made.append(element("td", { className: "number" }, number(one.scores[name]?.[key], digits)));
      }
      return made;
    });
    byId("structures").tHead.replaceChildren(head);
    byId("structures").tBodies[0].replaceChildren(...rows);
  }

  // The page.

  function radios(kind, values) {
    for (const value of values) {
      const radio = element("input", { type: "radio", name: kind, value, checked: state[kind] === value });
      radio.onchange = () => choose(kind, value);
      byId(kind).append(element("label", {}, radio, element("span", { textContent: value })));
    }
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    // Fields and radio buttons have keys of their own.
    if (event.target.matches?.("select, input:not([type=checkbox])")) return;
    const step = { ArrowDown: 1, ArrowRight: 1, PageUp: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: -1 }[event.key];
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const place = state.order.indexOf(state.open);
      const next = state.order[place < 0 ? 0 : place + step];
      if (next !== undefined) {
        open(next);
        if (event.target.matches?.(".case")) byId("table").querySelector(`[data-index="${next}"] .case`).focus();
      }
    } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      chooseStructure(Math.min(Math.max(state.structure + step, -1), structures.length - 1));
    } else if (step && viewer) {
      moveTo(Number(byId("slice").value) + step);
    } else if (SHOW[event.key - 1] && viewer) {
      choose("show", SHOW[event.key - 1]);
    } else return;
    // Neither the page nor NiiVue shall take the same key.
    event.preventDefault();
    event.stopPropagation();
  }

  function begin() {
    document.title = data.title;
    byId("title").textContent = data.title;
    byId("theme").onclick = () => {
      const { dataset } = document.documentElement;
      const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      dataset.theme = dark ? "light" : "dark";
    };
    list(byId("summary"), Object.entries(data.summary));
    byId("summary").hidden = !Object.keys(data.summary).length;
    list(document.querySelector("#facts dl"), [...Object.entries(data.settings), ...Object.entries(data.versions)]);
    for (const { caption, path } of data.pictures) {
      const image = element("img", { src: path, alt: caption, loading: "lazy" });
      document.querySelector(".pictures").append(element("figure", {}, image, element("figcaption", {}, caption)));
    }
    byId("pictures").hidden = !data.pictures.length;
    byId("note").textContent = data.note;
    byId("note").hidden = !data.note;
    byId("tables").append(...data.tables.map(table));
    byId("tables").hidden = !data.tables.length;
    if (!cases.length) return;

    byId("review").hidden = false;
    byId("count").textContent = cases.length;
    byId("structure").append(
      element("option", { value: -1, textContent: "all" }),
      ...structures.map(({ name }, k) => element("option", { value: k, textContent: name })),
    );
    byId("structure").onchange = (event) => chooseStructure(Number(event.target.value));
    radios("show", SHOW);
    radios("view", VIEWS);
    const legend = ([name, colour]) => element("span", { className: "legend" }, swatch(colour), name);
    byId("difference").append(...DIFFERENCES.map(legend));
    byId("opacity").oninput = paint;
    byId("slice").oninput = () => moveTo(Number(byId("slice").value));
    for (const id of ["low", "high"]) {
      byId(id).onchange = () => setWindow(Number(byId("low").value), Number(byId("high").value));
    }
    byId("reset").onclick = resetWindow;
    document.addEventListener("keydown", key, true);

    const first = ["dice", "quality", "flags"].find((key) => columns.some((column) => column.key === key));
    if (first) state.sort = { key: first, worst: true };
    fillTable();
    open(state.order.find((index) => cases[index].volumes.scan) ?? state.order[0]);
  }

  begin();
})();
