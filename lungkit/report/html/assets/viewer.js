"use strict";
// The viewer of a scan: panes, tools, keyboard. What it shows stands in the block "scan" (lungkit/report/html/case_page.py).

class Viewer {
  constructor(root, scan) {
    Object.assign(this, { root, scan, panes: [], timer: null });
    this.state = {
      cross: [...scan.start],
      window: [...scan.window],
      views: Object.fromEntries(Object.keys(PLANES).map((name) => [name, { zoom: 1, pan: [0, 0] }])),
      fill: 0,
      opacity: 0.5,
      showCross: true,
      rulers: [],
      blink: null,
      tool: "cross",
      layout: "planes",
    };
    for (const layer of [...scan.masks, ...scan.maps]) layer.shown = layer.shown ?? true;
    this.models = scan.masks.filter((mask) => mask.model);
    this.lesion = -1;
    this.connect();
    this.arrange("planes");
    new ResizeObserver(() => this.draw()).observe(this.grid);
    window.addEventListener("beforeprint", () => this.draw());
  }

  find(selector) { return this.root.querySelector(selector); }

  connect() {
    this.grid = this.find(".panes");
    this.root.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-do]");
      if (button) this.act(button.dataset.do, button.dataset.value);
    });
    this.root.addEventListener("keydown", (event) => this.key(event));
    for (const input of this.root.querySelectorAll("input[data-layer]")) {
      input.addEventListener("change", () => {
        this.layer(input.dataset.layer).shown = input.checked;
        this.draw();
      });
    }
    for (const input of this.root.querySelectorAll("input[data-amount]")) {
      this.state[input.dataset.amount] = input.value / 100;
      input.addEventListener("input", () => {
        this.state[input.dataset.amount] = input.value / 100;
        this.draw();
      });
    }
    for (const input of this.root.querySelectorAll("input[data-window]")) {
      input.addEventListener("change", () => {
        const [width, level] = ["width", "level"].map((name) => Number(this.find(`input[data-window=${name}]`).value));
        if (Number.isFinite(width) && width > 0 && Number.isFinite(level)) this.setWindow(level - width / 2, level + width / 2);
      });
    }
    for (const button of document.querySelectorAll("button[data-lesion]")) {
      button.addEventListener("click", () => this.jump(Number(button.dataset.lesion)));
    }
    for (const canvas of this.root.querySelectorAll("canvas.bar")) {
      const context = canvas.getContext("2d");
      for (let x = 0; x < canvas.width; x++) {
        context.fillStyle = `rgb(${viridis(x / (canvas.width - 1)).join(",")})`;
        context.fillRect(x, 0, 1, canvas.height);
      }
    }
  }

  layer(id) { return [...this.scan.masks, ...this.scan.maps].find((one) => one.id === id); }

  // Panes of a layout: three planes, one, or the axial plane once for every model.
  arrange(layout) {
    this.state.layout = layout;
    this.grid.replaceChildren();
    this.grid.dataset.layout = layout;
    const wanted = layout === "models"
      ? this.models.map((mask) => ["axial", mask])
      : (layout === "planes" ? Object.keys(PLANES) : [layout]).map((name) => [name, null]);
    this.panes = wanted.map(([name, mask]) => this.pane(name, mask));
    this.mark("layout", layout);
    this.draw();
  }

  pane(name, mask) {
    const title = mask ? `${name}: ${mask.name}` : name;
    const figure = document.createElement("figure");
    figure.className = `pane ${name}`;
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    const caption = document.createElement("figcaption");
    const label = document.createElement("span");
    const slider = document.createElement("input");
    const plane = new Plane(canvas, name, this.scan, mask ? mask.id : undefined);
    Object.assign(slider, { type: "range", min: 1, max: this.scan.shape[plane.axis], step: 1 });
    slider.setAttribute("aria-label", `${name} slice`);
    slider.addEventListener("input", () => this.scrollTo(plane.axis, slider.value - 1));
    caption.append(label, slider);
    figure.append(canvas, caption);
    this.grid.append(figure);
    const pane = { plane, canvas, label, slider, title };
    this.point(pane);
    return pane;
  }

  // Mouse, pen and fingers.
  point({ plane, canvas }) {
    const ratio = () => window.devicePixelRatio || 1;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) * ratio(), (event.clientY - box.top) * ratio()];
    };
    const held = new Map();
    let tool = null;
    let ruler = null;
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      canvas.focus({ preventScroll: true });
      held.set(event.pointerId, [event.clientX, event.clientY]);
      tool = held.size > 1 || event.button === 1 ? "pan" : event.button === 2 ? "window" : this.state.tool;
      const place = plane.fromCanvas(at(event), this.state.views[plane.name]);
      if (tool === "cross") this.moveTo(plane.toVoxel(place, this.state.cross));
      if (tool === "ruler") {
        ruler = { plane: plane.name, slice: this.state.cross[plane.axis], from: place, to: place };
        this.state.rulers.push(ruler);
      }
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = held.get(event.pointerId);
      if (!before) return;
      const [dx, dy] = [event.clientX - before[0], event.clientY - before[1]];
      const view = this.state.views[plane.name];
      const place = plane.fromCanvas(at(event), view);
      if (tool === "cross") this.moveTo(plane.toVoxel(place, this.state.cross));
      if (tool === "ruler" && ruler) { ruler.to = place; this.draw(); }
      if (tool === "window") this.dragWindow(dx, dy);
      if (tool === "pan") {
        if (held.size === 2) {
          const other = [...held].find(([id]) => id !== event.pointerId)[1];
          const apart = (one) => Math.hypot(one[0] - other[0], one[1] - other[1]);
          this.zoom(plane, apart([event.clientX, event.clientY]) / Math.max(apart(before), 1));
        }
        const scale = plane.scale(view) / ratio() * held.size;
        view.pan = [view.pan[0] - dx / scale, view.pan[1] - dy / scale];
        this.draw();
      }
      held.set(event.pointerId, [event.clientX, event.clientY]);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => {
        held.delete(event.pointerId);
        if (ruler && rulerLength(ruler) < 0.5) this.state.rulers.pop();
        ruler = null;
        this.draw();
      });
    }
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) {
        this.zoom(plane, Math.exp(-event.deltaY / 300), at(event));
      } else {
        this.step(plane, event.deltaY > 0 ? -1 : 1);
      }
    }, { passive: false });
  }

  key(event) {
    if (event.target.matches("input, select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
    const pane = this.panes.find(({ canvas }) => canvas === event.target) || this.panes[0];
    const { plane } = pane;
    // Arrows move the crosshair as seen: to the right of the picture the axes of the scan fall.
    const arrows = { ArrowLeft: [plane.u, 1], ArrowRight: [plane.u, -1], ArrowUp: [plane.v, 1], ArrowDown: [plane.v, -1] };
    const acts = {
      c: ["tool", "cross"], w: ["tool", "window"], p: ["tool", "pan"], r: ["tool", "ruler"],
      "+": ["zoom", "in"], "=": ["zoom", "in"], "-": ["zoom", "out"], 0: ["reset"], n: ["next", "1"], N: ["next", "-1"],
      b: ["blink"], x: ["crosshair"], Delete: ["unrule"], Backspace: ["unrule"], t: ["layers", "truth"], m: ["layers", "model"], o: ["layers", "map"],
    };
    const presets = [...this.root.querySelectorAll("button[data-do=window]")];
    if (event.target === pane.canvas && arrows[event.key]) {
      const [axis, way] = arrows[event.key];
      this.scrollTo(axis, this.state.cross[axis] + way * (event.shiftKey ? 10 : 1));
    } else if (["PageUp", "]"].includes(event.key)) {
      this.step(plane, 1);
    } else if (["PageDown", "["].includes(event.key)) {
      this.step(plane, -1);
    } else if (presets[Number(event.key) - 1]) {
      presets[Number(event.key) - 1].click();
    } else if (acts[event.key]) {
      this.act(...acts[event.key], plane);
    } else {
      return;
    }
    event.preventDefault();
  }

  act(what, value, plane = this.panes[0].plane) {
    if (what === "tool") {
      this.state.tool = value;
      this.mark("tool", value);
      this.grid.dataset.tool = value;
    } else if (what === "layout") {
      this.arrange(value);
    } else if (what === "window") {
      this.setWindow(...value.split(",").map(Number));
    } else if (what === "zoom") {
      this.zoom(plane, value === "in" ? 1.25 : 0.8);
    } else if (what === "reset") {
      for (const view of Object.values(this.state.views)) Object.assign(view, { zoom: 1, pan: [0, 0] });
      this.draw();
    } else if (what === "next") {
      const buttons = document.querySelectorAll("button[data-lesion]").length;
      if (buttons) this.jump((this.lesion + Number(value) + buttons) % buttons);
    } else if (what === "crosshair") {
      this.state.showCross = !this.state.showCross;
      this.mark("crosshair", this.state.showCross ? undefined : null);
      this.draw();
    } else if (what === "unrule") {
      this.state.rulers.pop();
      this.draw();
    } else if (what === "blink") {
      this.blink();
    } else if (what === "layers") {
      const inputs = [...this.root.querySelectorAll(`input[data-kind=${value}]`)];
      const shown = inputs.some((input) => input.checked);
      for (const input of inputs) if (input.checked === shown) input.click();
    }
  }

  mark(what, value) {
    for (const button of this.root.querySelectorAll(`button[data-do=${what}]`)) {
      button.setAttribute("aria-pressed", String(button.dataset.value === value));
    }
  }

  // Models one after the other in one place; slower than three flashes a second.
  blink() {
    const models = this.models.filter((mask) => mask.shown);
    const starting = this.timer === null && models.length > 0;
    if (this.timer !== null) clearInterval(this.timer);
    this.timer = null;
    this.state.blink = null;
    if (starting) {
      let number = 0;
      const next = () => {
        // A single model takes turns with nothing.
        this.state.blink = number < models.length ? models[number].id : "";
        number = (number + 1) % Math.max(models.length, 2);
        this.draw();
      };
      next();
      this.timer = setInterval(next, 700);
    }
    this.mark("blink", starting ? undefined : null);
    this.draw();
  }

  jump(number) {
    this.lesion = number;
    const buttons = [...document.querySelectorAll("button[data-lesion]")];
    for (const button of buttons) button.closest("tr").classList.toggle("current", button === buttons[number]);
    for (const view of Object.values(this.state.views)) view.pan = [0, 0];
    this.moveTo(buttons[number].dataset.voxel.split(",").map(Number), true);
    this.root.scrollIntoView({ block: "nearest" });
  }

  moveTo(voxel, centre = false) {
    this.state.cross = voxel;
    if (centre) {
      for (const { plane } of this.panes) {
        const view = this.state.views[plane.name];
        if (view.zoom > 1) view.pan = plane.toPlane(voxel).map((mm, i) => mm - plane.extent[i] / 2);
      }
    }
    this.draw();
  }

  scrollTo(axis, index) {
    const cross = [...this.state.cross];
    cross[axis] = Math.min(Math.max(index, 0), this.scan.shape[axis] - 1);
    this.moveTo(cross);
  }
  step(plane, way) { this.scrollTo(plane.axis, this.state.cross[plane.axis] + way); }

  zoom(plane, factor, pixel) {
    const view = this.state.views[plane.name];
    const fixed = pixel ? plane.fromCanvas(pixel, view) : plane.toPlane(this.state.cross);
    const zoom = Math.min(Math.max(view.zoom * factor, 0.5), 40);
    const share = view.zoom / zoom;
    view.pan = [0, 1].map((i) => {
      const middle = plane.extent[i] / 2 + view.pan[i];
      return fixed[i] + (middle - fixed[i]) * share - plane.extent[i] / 2;
    });
    view.zoom = zoom;
    this.draw();
  }

  dragWindow(dx, dy) {
    const [low, high] = this.state.window;
    const step = Math.max(high - low, this.scan.grain * 20) / 250;
    const width = Math.max(high - low + dx * step, this.scan.grain);
    const level = (low + high) / 2 + dy * step;
    this.setWindow(level - width / 2, level + width / 2);
  }
  setWindow(low, high) {
    this.state.window = [low, high];
    this.draw();
  }

  // At most one drawing a frame, however many events there are.
  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      for (const pane of this.panes) {
        pane.plane.resize();
        pane.plane.draw(this.state);
        const [slice, slices] = [this.state.cross[pane.plane.axis] + 1, this.scan.shape[pane.plane.axis]];
        pane.slider.value = slice;
        pane.label.textContent = `${pane.title} ${slice} of ${slices}`;
        pane.canvas.setAttribute("aria-label", `${pane.title}, slice ${slice} of ${slices}`);
      }
      this.tell();
    });
  }

  tell() {
    const { cross } = this.state;
    const [low, high] = this.state.window;
    const place = this.scan.to_lps.map((row) => row[0] * cross[0] + row[1] * cross[1] + row[2] * cross[2] + row[3]);
    this.root.dataset.cross = cross.join(",");
    this.root.dataset.window = `${low},${high}`;
    this.find(".place").textContent = place.map((mm) => mm.toFixed(1)).join(", ");
    const value = this.scan.image ? valueAt(this.scan.image, cross) : null;
    this.find(".value").textContent = value === null ? "-" : `${Number(value.toPrecision(5))} ${this.scan.unit}`.trim();
    for (const map of this.scan.maps) {
      this.find(`output[data-map="${map.id}"]`).textContent = (valueAt(map, cross) ?? 0).toFixed(2);
    }
    const [width, level] = [high - low, (high + low) / 2].map((one) => String(Number(one.toPrecision(4))));
    for (const [name, text] of [["width", width], ["level", level]]) {
      const input = this.find(`input[data-window=${name}]`);
      if (document.activeElement !== input) input.value = text;
    }
    for (const button of this.root.querySelectorAll("button[data-do=window]")) {
      const [from, to] = button.dataset.value.split(",").map(Number);
      button.setAttribute("aria-pressed", String(Math.abs(from - low) < 1e-6 && Math.abs(to - high) < 1e-6));
    }
  }
}

(async () => {
  const root = document.querySelector(".viewer");
  if (!root) return;
  const status = root.querySelector(".status");
  try {
    const scan = JSON.parse(document.getElementById("scan").textContent);
    await new Promise((resolve) => setTimeout(resolve));  // the page is seen before the work begins
    scan.image = scan.image && await unpackVolume(scan.image);
    scan.masks = await Promise.all(scan.masks.map(unpackVolume));
    scan.maps = await Promise.all(scan.maps.map(unpackVolume));
    new Viewer(root, scan);
    status.remove();
    root.dataset.ready = "yes";
  } catch (error) {
    status.textContent = `The scan cannot be shown: ${error.message}`;
    root.dataset.ready = "failed";
    throw error;
  }
})();
