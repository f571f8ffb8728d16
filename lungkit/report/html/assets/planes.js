"use strict";
// One plane of the scan on a canvas: grey values, overlays, contours, crosshair, rulers.
// A plane runs along two axes of the scan, both of which fall from the upper left corner: the front or the head is up,
// the patient's right or front on the left.

const PLANES = {
  axial: { axis: 2, u: 0, v: 1, sides: ["R", "L", "A", "P"] },
  coronal: { axis: 1, u: 0, v: 2, sides: ["R", "L", "H", "F"] },
  sagittal: { axis: 0, u: 1, v: 2, sides: ["A", "P", "H", "F"] },
};
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];

function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return [0, 2, 4].map((i) => {
    const [a, b] = [low, low + 1].map((n) => parseInt(VIRIDIS[n].slice(i, i + 2), 16));
    return Math.round(a + (b - a) * (at - low));
  });
}

class Plane {
  constructor(canvas, name, scan, only) {
    Object.assign(this, { canvas, name, scan, only, ...PLANES[name] });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.extent = [scan.shape[this.u] * scan.spacing[this.u], scan.shape[this.v] * scan.spacing[this.v]];
    this.pictures = new Map();
  }

  // mm on the plane, from its upper left corner, of the middle of a voxel; and the voxel of a place on the canvas.
  toPlane(voxel) {
    const { shape, spacing } = this.scan;
    return [this.u, this.v].map((axis) => (shape[axis] - voxel[axis] - 0.5) * spacing[axis]);
  }
  toVoxel(place, cross) {
    const { shape, spacing } = this.scan;
    const voxel = [...cross];
    [this.u, this.v].forEach((axis, i) => {
      voxel[axis] = Math.min(Math.max(Math.ceil(shape[axis] - place[i] / spacing[axis]) - 1, 0), shape[axis] - 1);
    });
    return voxel;
  }

  // Pixels per mm, and the transformation from the plane to the canvas.
  scale(view) {
    const fit = Math.min(this.canvas.width / this.extent[0], this.canvas.height / this.extent[1]);
    return fit * view.zoom;
  }
  toCanvas(place, view) {
    const scale = this.scale(view);
    const half = [this.canvas.width / 2, this.canvas.height / 2];
    return [0, 1].map((i) => (place[i] - this.extent[i] / 2 - view.pan[i]) * scale + half[i]);
  }
  fromCanvas(pixel, view) {
    const scale = this.scale(view);
    const half = [this.canvas.width / 2, this.canvas.height / 2];
    return [0, 1].map((i) => (pixel[i] - half[i]) / scale + this.extent[i] / 2 + view.pan[i]);
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const box = this.canvas.getBoundingClientRect();
    const [width, height] = [box.width, box.height].map((size) => Math.max(Math.round(size * ratio), 1));
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
  }

  draw(state) {
    const { context, canvas } = this;
    const view = state.views[this.name];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.scan.image) this.drawPicture(this.scan.image, state, greys(this.scan.image, state.window), true);
    for (const map of this.scan.maps) {
      if (map.shown) this.drawPicture(map, state, heat(map, state.opacity), true);
    }
    for (const mask of this.scan.masks) {
      if (!mask.shown || (this.only !== undefined && mask.model && mask.id !== this.only)) continue;
      if (state.blink !== null && mask.model && mask.id !== state.blink) continue;
      this.drawMask(mask, state);
    }
    if (state.showCross) this.drawCross(state.cross, view);
    this.drawRulers(state, view);
    this.drawLetters();
    this.drawScaleBar(view);
  }

  index(volume, cross) {
    return Math.floor(cross[this.axis] / volume.factor[this.axis]) - volume.offset[this.axis];
  }

  // The slice of a volume as a small picture, kept until the slice or its colours change.
  picture(volume, state, colours) {
    const slice = this.index(volume, state.cross);
    const [width, height] = [volume.shape[this.u], volume.shape[this.v]];
    if (slice < 0 || slice >= volume.shape[this.axis] || !width || !height) return null;
    const key = `${slice} ${colours.key}`;
    const kept = this.pictures.get(volume);
    if (kept && kept.key === key) return kept.canvas;
    const canvas = kept ? kept.canvas : document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const pixels = new ImageData(width, height);
    const words = new Uint32Array(pixels.data.buffer);
    const [du, dv] = [volume.strides[this.u], volume.strides[this.v]];
    let at = 0;
    for (let row = height - 1; row >= 0; row--) {
      let index = slice * volume.strides[this.axis] + row * dv + (width - 1) * du;
      for (let column = 0; column < width; column++, index -= du) {
        words[at++] = colours.table[volume.values[index] + colours.shift];
      }
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.pictures.set(volume, { key, canvas });
    return canvas;
  }

  drawPicture(volume, state, colours, smooth) {
    const picture = this.picture(volume, state, colours);
    if (!picture) return;
    const { shape, spacing } = this.scan;
    const view = state.views[this.name];
    const ends = [this.u, this.v].map((axis) => {
      const step = volume.factor[axis];
      const first = volume.offset[axis] * step;
      const last = first + volume.shape[axis] * step;
      return [(shape[axis] - last) * spacing[axis], (shape[axis] - first) * spacing[axis]];
    });
    const from = this.toCanvas([ends[0][0], ends[1][0]], view);
    const to = this.toCanvas([ends[0][1], ends[1][1]], view);
    this.context.imageSmoothingEnabled = smooth;
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(picture, from[0], from[1], to[0] - from[0], to[1] - from[1]);
  }

  drawMask(mask, state) {
    if (state.fill > 0) this.drawPicture(mask, state, fills(mask, state.fill), false);
    const slice = this.index(mask, state.cross);
    if (slice < 0 || slice >= mask.shape[this.axis] || !mask.values.length) return;
    const { context } = this;
    const view = state.views[this.name];
    const ratio = window.devicePixelRatio || 1;
    for (const { value, colour } of mask.classes) {
      context.beginPath();
      this.outline(mask, slice, value, view);
      context.lineJoin = "round";
      context.setLineDash([]);
      context.strokeStyle = "rgba(0, 0, 0, 0.6)";  // so that a line is seen on bright bone as well
      context.lineWidth = 3.2 * ratio;
      context.stroke();
      if (mask.dashed) context.setLineDash([5 * ratio, 3 * ratio]);
      context.strokeStyle = colour;
      context.lineWidth = 1.8 * ratio;
      context.stroke();
    }
    context.setLineDash([]);
  }

  // Along the faces between voxels of a class and others, as long straight lines.
  outline(mask, slice, value, view) {
    const { shape, spacing } = this.scan;
    const sizes = [mask.shape[this.u], mask.shape[this.v]];
    const steps = [mask.strides[this.u], mask.strides[this.v]];
    const start = slice * mask.strides[this.axis];
    const inside = (u, v) =>
      u >= 0 && v >= 0 && u < sizes[0] && v < sizes[1] &&
      mask.values[start + u * steps[0] + v * steps[1]] === value;
    const corner = (u, v) => this.toCanvas(
      [[u, this.u, 0], [v, this.v, 1]].map(([at, axis]) => (shape[axis] - mask.offset[axis] - at) * spacing[axis]),
      view,
    );
    const line = (from, to) => {
      this.context.moveTo(...corner(...from));
      this.context.lineTo(...corner(...to));
    };
    for (let v = 0; v <= sizes[1]; v++) {
      let from = -1;
      for (let u = 0; u <= sizes[0]; u++) {
        const edge = u < sizes[0] && inside(u, v) !== inside(u, v - 1);
        if (edge && from < 0) from = u;
        if (!edge && from >= 0) { line([from, v], [u, v]); from = -1; }
      }
    }
    for (let u = 0; u <= sizes[0]; u++) {
      let from = -1;
      for (let v = 0; v <= sizes[1]; v++) {
        const edge = v < sizes[1] && inside(u, v) !== inside(u - 1, v);
        if (edge && from < 0) from = v;
        if (!edge && from >= 0) { line([u, from], [u, v]); from = -1; }
      }
    }
  }

  drawCross(cross, view) {
    const { context, canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const [x, y] = this.toCanvas(this.toPlane(cross), view);
    const gap = 10 * ratio;
    context.strokeStyle = "rgba(255, 255, 255, 0.75)";
    context.lineWidth = ratio;
    context.beginPath();
    for (const [a, b, c, d] of [
      [0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap], [x, y + gap, x, canvas.height],
    ]) {
      context.moveTo(a, b);
      context.lineTo(c, d);
    }
    context.stroke();
  }

  drawRulers(state, view) {
    const ratio = window.devicePixelRatio || 1;
    for (const ruler of state.rulers) {
      if (ruler.plane !== this.name || ruler.slice !== state.cross[this.axis]) continue;
      const [from, to] = [ruler.from, ruler.to].map((place) => this.toCanvas(place, view));
      const { context } = this;
      for (const [colour, width] of [["rgba(0, 0, 0, 0.7)", 4], ["#f0e442", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = width * ratio;
        context.beginPath();
        context.moveTo(...from);
        context.lineTo(...to);
        context.stroke();
      }
      this.text(`${rulerLength(ruler).toFixed(1)} mm`, to[0] + 8 * ratio, to[1] - 8 * ratio, "left", "#f0e442");
    }
  }

  drawLetters() {
    const { canvas, sides } = this;
    const edge = 8 * (window.devicePixelRatio || 1);
    this.text(sides[0], edge, canvas.height / 2, "left");
    this.text(sides[1], canvas.width - edge, canvas.height / 2, "right");
    this.text(sides[2], canvas.width / 2, 2 * edge, "center");
    this.text(sides[3], canvas.width / 2, canvas.height - edge, "center");
  }

  drawScaleBar(view) {
    const ratio = window.devicePixelRatio || 1;
    const scale = this.scale(view);
    const length = [100, 50, 20, 10, 5, 2, 1].find((mm) => mm * scale < this.canvas.width * 0.3);
    if (!length) return;
    const [x, y] = [12 * ratio, this.canvas.height - 14 * ratio];
    for (const [colour, width] of [["rgba(0, 0, 0, 0.7)", 5], ["#fff", 2.5]]) {
      this.context.strokeStyle = colour;
      this.context.lineWidth = width * ratio;
      this.context.beginPath();
      this.context.moveTo(x, y);
      this.context.lineTo(x + length * scale, y);
      this.context.stroke();
    }
    this.text(`${length} mm`, x, y - 12 * ratio, "left");
  }

  text(text, x, y, align, colour = "#fff") {
    const { context } = this;
    const ratio = window.devicePixelRatio || 1;
    context.font = `600 ${12 * ratio}px system-ui, sans-serif`;
    context.textAlign = align;
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.strokeStyle = "rgba(0, 0, 0, 0.8)";
    context.lineWidth = 3 * ratio;
    context.strokeText(text, x, y);
    context.fillStyle = colour;
    context.fillText(text, x, y);
  }
}

function rulerLength({ from, to }) {
  return Math.hypot(to[0] - from[0], to[1] - from[1]);
}

// Tables from a stored value to a pixel (little endian: alpha, blue, green, red).
function pixel(red, green, blue, alpha) {
  return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
const tables = new Map();
function table(key, size, shift, colour) {
  if (tables.size > 64) tables.clear();
  if (!tables.has(key)) tables.set(key, { key, shift, table: Uint32Array.from({ length: size }, (_, i) => colour(i - shift)) });
  return tables.get(key);
}
function greys(image, [low, high]) {
  const [size, shift] = image.coding === "i16" ? [65536, 32768] : [256, 0];
  return table(`grey ${low} ${high}`, size, shift, (stored) => {
    const value = stored * image.scale + image.intercept;
    const grey = Math.round(Math.min(Math.max((value - low) / Math.max(high - low, 1e-6), 0), 1) * 255);
    return pixel(grey, grey, grey, 255);
  });
}
function heat(map, opacity) {
  return table(`heat ${opacity}`, 256, 0, (stored) => {
    const share = stored / 255;
    // Where there is next to nothing, the scan is seen as it is.
    return pixel(...viridis(share), Math.round(255 * opacity * Math.min(1, share * 4)));
  });
}
function fills(mask, opacity) {
  return table(`fill ${mask.id} ${opacity}`, 256, 0, (stored) => {
    const found = mask.classes.find(({ value }) => value === stored);
    if (!found) return 0;
    const [red, green, blue] = [1, 3, 5].map((i) => parseInt(found.colour.slice(i, i + 2), 16));
    return pixel(red, green, blue, Math.round(255 * opacity));
  });
}
