"use strict";
(async () => {
  const find = (name) => document.getElementById(name);
  const settings = JSON.parse(find("settings").textContent);
  const stage = find("stage");
  const status = find("status");
  const slider = find("slider");
  // The right one takes the mouse; the left one, which lies on top of it, only follows.
  const names = ["right", "left"].filter(find);
  const progress = {};

  function say(text) {
    status.textContent = text;
    status.hidden = !text;
  }

  function bytesOf(name) {
    const text = atob(find(name).textContent);
    return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  }

  async function loadViewer() {
    const packed = new Blob([bytesOf("viewer")]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(packed).text();
    document.head.append(script);
  }

  // The viewer takes the angle of the longer side, the page is told that of the height.
  function pose() {
    if (!settings.camera) return [];
    const { clientWidth: width, clientHeight: height } = stage;
    const half = Math.tan((settings.camera.fov * Math.PI) / 360) * Math.max(1, width / height);
    return [{ initial: { ...settings.camera, fov: (360 / Math.PI) * Math.atan(half) } }];
  }

  async function show(name) {
    const holder = find(name);
    const viewer = await SuperSplat.createViewer({
      container: holder,
      settings: { background: { color: settings.background }, cameras: pose(), ...plain },
      contentUrl: "scene.sog",
      contents: Promise.resolve(new Response(bytesOf(`${name}-scene`))),
      renderer: "webgl",
      ui: false,
      noanim: true,
      aa: settings.antialiased[name],
    });
    // By depth, as scenes are trained and our own pictures drawn; the viewer's own order is that of distances.
    viewer.app.scene.gsplat.radialSorting = false;
    viewer.app.root.on("childinsert", (node) => {
      if (node.name === "gsplat") node.setLocalRotation(...settings.rotation);
    });
    viewer.app.assets.on("error", (error) => say(`The scene could not be shown: ${error}`));
    viewer.events.on("progress:changed", () => report(name, viewer));
    viewer.events.on("loaded:changed", () => {
      holder.classList.add("drawn");
      viewer.state.cameraMode = "orbit";
      report(name, viewer);
    });
    return viewer;
  }

  function report(name, viewer) {
    progress[name] = viewer.state.loaded ? 100 : Math.min(99, viewer.state.progress);
    const share = names.reduce((sum, other) => sum + (progress[other] ?? 0), 0) / names.length;
    say(share < 100 ? `Loading the scene: ${Math.trunc(share)} %` : "");
    find("buttons").hidden = share < 100;
  }

  // After the follower has placed its own camera and before it draws.
  function follow(leader, follower) {
    const [from, to] = [leader, follower].map((viewer) => viewer.app.root.findByName("camera"));
    let seen = "";
    follower.app.on("framerender", () => {
      to.setPosition(from.getPosition());
      to.setRotation(from.getRotation());
      const lens = ["fov", "horizontalFov", "nearClip", "farClip"].map((key) => (to.camera[key] = from.camera[key]));
      const now = [...from.getWorldTransform().data, ...lens].join();
      if (now !== seen) follower.app.renderNextFrame = true;
      seen = now;
    });
  }

  function addButtons(viewer) {
    const modes = { orbit: "Fly", fly: "Orbit" };
    const actions = {
      "Start view": () => viewer.resetCamera(),
      "Whole scene": () => viewer.frameScene(),
      Fly: (button) => {
        viewer.state.cameraMode = viewer.state.cameraMode === "fly" ? "orbit" : "fly";
        button.textContent = modes[viewer.state.cameraMode];
      },
      "Full screen": () => (document.fullscreenElement ? document.exitFullscreen() : stage.requestFullscreen()),
    };
    for (const [text, act] of Object.entries(actions)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => act(button));
      find("buttons").append(button);
    }
  }

  // The viewer listens for keys on the whole page; the slider and the rest of the page need theirs.
  function keepKeys(viewers) {
    const set = () => {
      viewers.forEach((viewer, index) => (viewer.state.inputEnabled = index === 0 && document.activeElement === stage));
    };
    document.addEventListener("focusin", set);
    document.addEventListener("focusout", () => setTimeout(set));
    stage.addEventListener("pointerdown", (event) => event.target.tagName === "CANVAS" && stage.focus());
    set();
  }

  const off = { enabled: false };
  const plain = {
    version: 2,
    tonemapping: "none",
    highPrecisionRendering: false,
    postEffectSettings: { sharpness: off, bloom: off, grading: off, vignette: off, fringing: off },
    animTracks: [],
    annotations: [],
    startMode: "default",
  };

  if (slider) {
    const move = () => stage.style.setProperty("--share", slider.value / 100);
    slider.addEventListener("input", move);
    move();
  }
  if (!document.createElement("canvas").getContext("webgl2") || !("DecompressionStream" in window)) {
    say("This browser cannot draw the scene: it has no WebGL 2, has it switched off, or is older than 2023.");
    return;
  }
  try {
    say("Loading the scene");
    await loadViewer();
    const viewers = [];
    for (const name of names) viewers.push(await show(name));
    if (viewers.length > 1) follow(...viewers);
    addButtons(viewers[0]);
    keepKeys(viewers);
    window.viewers = viewers;
  } catch (error) {
    say(`The scene could not be shown: ${error.message}`);
  }
})();
